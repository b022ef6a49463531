"""The merged linear map: y_g = x_g E_hat_g^T, forward and backward, in slices and without a [G, N, out, in] tensor.

    T_i     = keep_i * M_i tau_i,   tau_i = E_i - E_m          the same for every group         [N, out, in]
    E_hat_g = E_m + alpha * sum_i s_gi T_i                     one matrix product over N        [G, out, in]

Two exact forms. *Merge*, for one merged expert a group (weights [G, N]): slices of `out` rows of E_hat are made, used
and dropped. *Mix*, for one merged expert a token (weights [G, L, N]): by linearity
y = x E_m^T + alpha * sum_i (s_i x) T_i^T, so that nothing is merged at all.

Backward of *merge*, from dy, with H_g = dy_g^T x_g [out, in] (slice by slice):

    dx_g = dy_g E_hat_g      dE_m = sum_g H_g      ds_gi = alpha <H_g, T_i>      dT_i = alpha * sum_g s_gi H_g

then dtau_i = M_i^T (keep_i * dT_i), dE_i = dtau_i, dE_m -= sum_i dtau_i. Saved for it: x, s and the parameters; T and
E_hat are made again. A group is a sequence, a segment or a batch of tokens, as `ffn.py` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from camex_ft.moe.curvature import Factors, curve

# tau [N, ...] -> multiplier of the same shape, constant for the gradient, or None for one everywhere
Keep = Callable[[Tensor], Tensor | None]
# elements of one slice of E_hat for all groups: 8 MB in float32 stay near the cores; a GPU wants few large products
SLICE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}


class Gradients(NamedTuple):
    """Gradients of one merged or mixed product; None where not needed."""

    x: Tensor | None
    weights: Tensor | None
    base: Tensor | None
    vectors: Tensor | None


def transform(experts: Tensor, base: Tensor | None, keep: Keep | None, factors: Factors | None) -> Tensor:
    """Return T_i = keep_i(tau) * M_i tau_i; [N, out, in]; the experts themselves where there is no base."""
    if base is None:
        return experts
    tau = experts - base
    kept = None if keep is None else keep(tau)
    curved = tau if factors is None else curve(tau, factors)
    return curved if kept is None else curved * kept


def transform_backward(
    grad: Tensor, experts: Tensor, base: Tensor, keep: Keep | None, factors: Factors | None, *, learn: bool
) -> tuple[Tensor, Factors | None]:
    """Pull dT back through mask and curvature: return (dtau [N, out, in], d factors if they `learn`)."""
    if keep is None and factors is None:
        return grad, None
    tau = experts - base
    kept = None if keep is None else keep(tau)
    if kept is not None:
        grad = grad * kept
    if factors is None:
        return grad, None
    if not learn:
        return curve(grad, Factors(*(f.mT for f in factors))), None  # M_i^T dT_i
    total = torch.zeros_like(tau)
    terms = []
    tau.requires_grad_()
    for term in zip(*factors, strict=True):  # a term at a time: its intermediates are freed before the next
        with torch.enable_grad():
            leaves = [f.detach().unsqueeze(0).requires_grad_() for f in term]
            curved = curve(tau, Factors(*leaves))
        dtau, *dfactors = torch.autograd.grad(curved, [tau, *leaves], grad)
        total += dtau
        terms.append(dfactors)
    return total, Factors(*(torch.cat(same) for same in zip(*terms, strict=True)))


def slices(out: int, groups: int, width: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of the `out` rows such that one slice of E_hat, [groups, rows, width], fits the budget."""
    budget = SLICE_ELEMENTS.get(device.type, SLICE_ELEMENTS["cpu"])
    rows = max(16, budget // (groups * width))
    for start in range(0, out, rows):
        yield slice(start, min(start + rows, out))


def merge_rows(weights: Tensor, base: Tensor | None, vectors: Tensor, alpha: float, rows: slice) -> Tensor:
    """Return the rows of E_hat = E_m + alpha * s T for all groups; [G, rows, in]."""
    part = vectors[:, rows].flatten(1)  # [N, rows * in]
    if base is None:
        merged = alpha * (weights @ part) if alpha != 1 else weights @ part
    else:
        merged = torch.addmm(base[rows].reshape(1, -1), weights, part, alpha=alpha)  # [G, rows * in]
    return merged.view(weights.shape[0], -1, vectors.shape[-1])


def merge_forward(x: Tensor, weights: Tensor, base: Tensor | None, vectors: Tensor, alpha: float) -> Tensor:
    """Return y_g = x_g E_hat_g^T for weights [G, N]; [G, L, out] in x's dtype."""
    y = x.new_empty(*x.shape[:2], vectors.shape[1])
    for rows in slices(vectors.shape[1], x.shape[0], x.shape[2], x.device):
        merged = merge_rows(weights, base, vectors, alpha, rows).to(x.dtype)
        y[:, :, rows] = torch.bmm(x, merged.mT)
    return y


def merge_backward(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    base: Tensor | None,
    vectors: Tensor,
    alpha: float,
    needs: Gradients,
) -> Gradients:
    """Return the gradients of `merge_forward`; `needs` holds a tensor of zeros to add to for each one wanted."""
    for rows in slices(vectors.shape[1], x.shape[0], x.shape[2], x.device):
        dy_rows = dy[:, :, rows]
        if needs.x is not None:
            merged = merge_rows(weights, base, vectors, alpha, rows).to(x.dtype)
            needs.x.baddbmm_(dy_rows, merged)
        if needs.weights is None and needs.base is None and needs.vectors is None:
            continue
        h = torch.bmm(dy_rows.mT, x).to(vectors.dtype)  # H_g [G, rows, in]
        flat, part = h.flatten(1), vectors[:, rows].flatten(1)
        if needs.weights is not None:
            needs.weights.addmm_(flat, part.mT, alpha=alpha)
        if needs.vectors is not None:
            needs.vectors[:, rows] = (weights.mT @ flat).view(-1, *h.shape[1:]).mul_(alpha)
        if needs.base is not None:
            needs.base[rows] = h.sum(0)
    return needs


def mix_forward(x: Tensor, weights: Tensor, base: Tensor | None, vectors: Tensor, alpha: float) -> Tensor:
    """Return y = x E_m^T + alpha * sum_i (s_i x) T_i^T for weights [M, N] and tokens x [M, in]; [M, out]."""
    y = x.new_zeros(x.shape[0], vectors.shape[1]) if base is None else x @ base.to(x.dtype).mT
    for s, vector in zip(weights.to(x.dtype).mT, vectors, strict=True):
        y.addmm_(x * s.unsqueeze(1), vector.to(x.dtype).mT, alpha=alpha)
    return y


def mix_backward(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    base: Tensor | None,
    vectors: Tensor,
    alpha: float,
    needs: Gradients,
) -> Gradients:
    """Return the gradients of `mix_forward`; `needs` holds a tensor of zeros to add to for each one wanted."""
    for i, vector in enumerate(vectors):
        s = weights[:, i : i + 1].to(x.dtype)  # [M, 1]
        if needs.x is not None or needs.weights is not None:
            back = dy @ vector.to(x.dtype)  # dy T_i [M, in]
            if needs.x is not None:
                needs.x.addcmul_(back, s, value=alpha)
            if needs.weights is not None:
                needs.weights[:, i] = alpha * (back * x).sum(-1)
        if needs.vectors is not None:
            needs.vectors[i] = alpha * (dy.mT @ (x * s))
    if base is not None and needs.x is not None:
        needs.x.addmm_(dy, base.to(x.dtype))
    if needs.base is not None:
        needs.base.copy_(dy.mT @ x)
    return needs


class MergedLinear(torch.autograd.Function):
    """`merged_linear` with its hand-written backward pass; see the module's docstring for the formulas."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        base: Tensor | None,
        alpha: float,
        keep: Keep | None,
        *factors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weights, experts, base, *factors)
        ctx.alpha, ctx.keep = alpha, keep
        vectors = transform(experts, base, keep, Factors(*factors) if factors else None)
        if weights.dim() == 2:
            return merge_forward(x, weights.to(vectors.dtype), base, vectors, alpha)
        y = mix_forward(x.flatten(0, 1), weights.flatten(0, 1), base, vectors, alpha)
        return y.view(*x.shape[:2], -1)  # [G, L, out]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, experts, base, *saved = ctx.saved_tensors
        factors = Factors(*saved) if saved else None
        x_needed, weights_needed, experts_needed, base_needed, _, _, *_ = ctx.needs_input_grad
        curved = any(ctx.needs_input_grad[6:])
        vectors_needed = experts_needed or curved or (base_needed and base is not None)
        vectors = transform(experts, base, ctx.keep, factors)
        dx = torch.zeros_like(x) if x_needed else None
        dweights = torch.zeros_like(weights, dtype=vectors.dtype) if weights_needed else None
        needs = Gradients(
            x=dx if dx is None or weights.dim() == 2 else dx.flatten(0, 1),
            weights=dweights if dweights is None or weights.dim() == 2 else dweights.flatten(0, 1),
            base=torch.zeros_like(base) if base is not None and base_needed else None,
            vectors=torch.empty_like(vectors) if vectors_needed else None,
        )
        if weights.dim() == 2:
            merge_backward(dy, x, weights.to(vectors.dtype), base, vectors, ctx.alpha, needs)
        else:
            mix_backward(
                dy.flatten(0, 1), x.flatten(0, 1), weights.flatten(0, 1), base, vectors, ctx.alpha, needs
            )
        del vectors
        dexperts, dfactors = needs.vectors, None
        if base is not None and needs.vectors is not None:
            dexperts, dfactors = transform_backward(
                needs.vectors, experts, base, ctx.keep, factors, learn=curved
            )
            if needs.base is not None:
                needs.base.sub_(dexperts.sum(0))
        dfactors_out = tuple(dfactors) if dfactors is not None else (None,) * len(saved)
        if dweights is not None:
            dweights = dweights.to(weights.dtype)
        return dx, dweights, dexperts if experts_needed else None, needs.base, None, None, *dfactors_out


def merged_linear(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    base: Tensor | None,
    *,
    alpha: float = 1.0,
    keep: Keep | None = None,
    factors: Factors | None = None,
) -> Tensor:
    """Return y = x E_hat^T with E_hat = E_m + alpha * sum_i s_i keep_i(tau) * M_i tau_i.

    Args:
        x: inputs; [G, L, in]. Its dtype, or autocast's, is that of the products with x; merging is in the experts'.
        weights: routing weights s: [G, N], one merged expert a group, or [G, L, N], one a token.
        experts: E_i; [N, out, in].
        base: E_m; [out, in]; None merges the experts themselves: E_hat = alpha * sum_i s_i E_i.
        alpha: merging step size.
        keep: the protocol's multiplier on domain vectors, constant for the gradient. It is called again in the backward
            pass and must then return the same.
        factors: of the curvature M; None is the identity.

    Returns:
        [G, L, out], in the dtype of the products.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device_type=device, enabled=False):
        return MergedLinear.apply(x, weights, experts, base, alpha, keep, *(factors or ()))
