"""The merged linear map y_g = x_g E_hat_g^T: forward and backward, without a [G, N, out, in] tensor.

    T_i     = keep_i * M_i tau_i,   tau_i = E_i - E_m          the same for every group         [N, out, in]
    E_hat_g = E_m + alpha * sum_i s_gi T_i                                                      [G, out, in]

`vectors` makes T and takes its gradient back, `merge` and `mix` are two exact forms of the product, and `cost` chooses
between them. Saved for the backward pass: x, s and the parameters; T and E_hat are made again, unless T is `Shared`.
A group is a sequence, a segment or a token, as `ffn` decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from camex_ft.moe.cost import Form, Shape, cheaper, curves_once
from camex_ft.moe.kronecker import Factors
from camex_ft.moe.merge import Gradients, Part, merge_backward, merge_forward
from camex_ft.moe.mix import Mix, mix_backward, mix_forward
from camex_ft.moe.reuse import Shared
from camex_ft.moe.scratch import scratch
from camex_ft.moe.vectors import Keep, Recipe, Weigh, pull_back, transform


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one call does, beside its tensors.

    Attributes:
        alpha, keep, sparse, shared, last: as `merged_linear` was given them.
        form: of the product.
        active: the experts that any group uses; None for all.
        once: the backward pass makes T while it takes dT back.
    """

    alpha: float
    keep: Keep | None
    sparse: bool
    shared: Shared | None
    last: bool
    form: Form
    active: list[int] | None
    once: bool


class Gathered:
    """The gradient of T, as the backward pass of a product hands it over, and its way back to the parameters."""

    def __init__(self, recipe: Recipe, call: Call, base: Tensor | None) -> None:
        self.recipe, self.call, self.base = recipe, call, base
        # where rows are independent of each other, they are taken back to tau at once
        self.direct = call.shared is None and call.form == "merge" and recipe.by_rows
        shared, experts = call.shared, recipe.experts
        self.add = shared is not None
        if shared is None:
            partly = call.active is not None or (call.form == "mix" and call.sparse)
            self.grad = torch.zeros_like(experts) if partly else torch.empty_like(experts)
        else:
            if shared.closed:
                raise RuntimeError(
                    "a map with experts ran twice in the last micro-batch of an optimizer step: "
                    "set merging.keep_vectors: false"
                )
            if shared.grad is None:
                shared.grad = torch.zeros_like(experts)
            self.grad = shared.grad

    def rows(self, rows: slice, part: Tensor) -> None:
        """Take rows of dT of the active experts; [N', rows, in]."""
        if self.direct and self.recipe.base is not None:
            kept = None if self.recipe.keep is None else self.recipe.keep(self.recipe.tau(rows))
            if kept is not None:
                part.mul_(_active(kept, self.call.active))
            if self.base is not None:
                self.base[rows] -= part.sum(0)
        if self.call.active is not None:
            self.grad[:, rows].index_copy_(0, torch.tensor(self.call.active), part)
        elif self.add:
            self.grad[:, rows] += part
        else:
            self.grad[:, rows] = part

    def one(self, i: int | slice, part: Tensor) -> None:
        """Take dT of one expert, [out, in], or of all."""
        if self.add:
            self.grad[i] += part
        else:
            self.grad[i] = part

    def back(
        self, *, learn: bool, domain: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Factors | None]:
        """Return (dE, d factors) and subtract sum_i dtau_i from the gradient of the base; nothing before the last.

        T is written to `out`, see `pull_back`.
        """
        shared, recipe = self.call.shared, self.recipe
        if shared is not None:
            if not self.call.last:
                return None, None
            shared.closed, shared.grad = True, None
        if self.direct:
            return self.grad, None
        factors = pull_back(self.grad, recipe, self.call.active, learn=learn, domain=domain, out=out)
        if self.base is not None:
            self.base.sub_(self.grad.sum(0))
        return self.grad, factors


class MergedLinear(torch.autograd.Function):
    """`merged_linear` with its hand-written backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        base: Tensor | None,
        call: Call,
        *factors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weights, experts, base, *factors)
        ctx.call = call
        recipe = Recipe(experts, base, call.keep, Factors(*factors) if factors else None)
        vectors, s = _vectors(recipe, call), weights.to(experts.dtype)
        if call.form == "mix":
            return mix_forward(_mix(x, s, recipe, vectors, call))
        part, s = _part(recipe, vectors, call.active), _active(s, call.active, dim=1)
        return merge_forward(x, s, base, part, experts.shape[1], call.alpha)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, experts, base, *saved = ctx.saved_tensors
        x_needed, weights_needed, experts_needed, base_needed, _, *factors_needed = ctx.needs_input_grad
        call: Call = ctx.call
        recipe = Recipe(experts, base, call.keep, Factors(*saved) if saved else None)
        learn, domain = any(factors_needed), experts_needed or (base is not None and base_needed)
        s = weights.to(experts.dtype)
        into = Gradients(
            torch.zeros_like(x) if x_needed else None,
            torch.zeros_like(s) if weights_needed else None,
            torch.empty_like(base) if base is not None and base_needed else None,
        )
        gathered = Gathered(recipe, call, into.base) if learn or domain else None
        dexperts: Tensor | None = None
        dfactors: Sequence[Tensor | None] = (None,) * len(saved)
        if gathered is not None and call.once and learn:
            _backward(dy, x, s, recipe, None, call, Gradients(None, None, into.base), gathered)
            vectors = scratch("vectors", experts.shape, experts)
            dexperts, found = gathered.back(learn=True, domain=domain, out=vectors)
            _backward(dy, x, s, recipe, vectors, call, into._replace(base=None), None)
        else:
            _backward(dy, x, s, recipe, _vectors(recipe, call), call, into, gathered)
            if gathered is not None:
                dexperts, found = gathered.back(learn=learn, domain=domain)
        if gathered is not None:
            dfactors = found or dfactors
        dweights = into.weights
        if dweights is not None:
            dweights = (dweights.where(s != 0, 0) if call.sparse else dweights).to(weights.dtype)
        return into.x, dweights, dexperts if experts_needed else None, into.base, None, *dfactors


def _backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    recipe: Recipe,
    vectors: Tensor | None,
    call: Call,
    into: Gradients,
    gathered: Gathered | None,
) -> None:
    """Take dy back through the product: to `into`, and dT to `gathered`."""
    if call.form == "mix":
        mix = _mix(x, s, recipe, vectors, call)
        mix_backward(dy, mix, into, None if gathered is None else gathered.one)
        return
    part, columns = _part(recipe, vectors, call.active), _active(s, call.active, dim=1)
    dcolumns = None if into.weights is None else torch.zeros_like(columns)
    take = None if gathered is None else gathered.rows
    merge_backward(dy, x, columns, recipe.base, part, call.alpha, into._replace(weights=dcolumns), take)
    if into.weights is not None and dcolumns is not None:
        into.weights[:, slice(None) if call.active is None else call.active] = dcolumns


def merged_linear(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    base: Tensor | None,
    *,
    alpha: float = 1.0,
    keep: Weigh | None = None,
    factors: Factors | None = None,
    sparse: bool = False,
    form: Form | Literal["auto"] = "auto",
    shared: Shared | None = None,
    last: bool = True,
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
        sparse: zeros among the weights, of top-k routing, are constants: they have no gradient and cost no work.
        form: of the product, or "auto", the one that the cost model predicts to be faster.
        shared: T, made before by `transform` from the same experts, base, keep and factors.
        last: where T is shared: whether the backward pass takes the gradient of T, summed over all calls that share it,
            back to experts, base and factors. Before that they have no gradient through T.

    Returns:
        [G, L, out], in the dtype of the products.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    lead = x.shape[:2]
    if weights.dim() == 3:  # every token is a group
        x, weights = x.flatten(0, 1).unsqueeze(1), weights.flatten(0, 1)  # [G * L, 1, in], [G * L, N]
    shape = _shape(x, weights, experts, factors, sparse)
    if form == "auto":
        form = cheaper(shape)
    call = Call(
        alpha=alpha,
        keep=Keep.of(keep),
        sparse=sparse,
        shared=shared,
        last=last,
        form=form,
        active=_used(weights) if sparse and shared is None and device == "cpu" else None,
        once=form == "merge" and shared is None and factors is not None and curves_once(shape),
    )
    with torch.autocast(device_type=device, enabled=False):
        y: Tensor = MergedLinear.apply(x, weights, experts, base, call, *(factors or ()))
    return y.view(*lead, -1)


def _shape(x: Tensor, weights: Tensor, experts: Tensor, factors: Factors | None, sparse: bool) -> Shape:
    groups, length, width = x.shape
    count, out = experts.shape[:2]
    used: float = count
    if sparse and x.device.type == "cpu":
        used = float(weights.detach().count_nonzero()) / max(1, groups)
    return Shape(
        groups=groups,
        length=length,
        out=out,
        width=width,
        experts=count,
        used=used,
        rank=0 if factors is None else factors.a1.shape[0],
        factors=sum(f.shape[-1] for f in factors or ()),
    )


def _used(weights: Tensor) -> list[int] | None:
    """Return the experts that any group uses; None where all are used."""
    used: list[int] = (weights.detach() != 0).any(0).nonzero().squeeze(1).tolist()
    return None if len(used) == weights.shape[1] else used


def _active(tensor: Tensor, active: list[int] | None, dim: int = 0) -> Tensor:
    return tensor if active is None else tensor.index_select(dim, torch.tensor(active))


def _vectors(recipe: Recipe, call: Call) -> Tensor | None:
    """Return T, or None where the product makes what it needs of it from experts and base."""
    if call.shared is not None:
        return call.shared.vectors
    plain = recipe.base is None or (recipe.keep is None and recipe.factors is None)
    if plain or (call.form == "merge" and recipe.by_rows):
        return None
    return transform(recipe, call.active, out=scratch("vectors", recipe.experts.shape, recipe.experts))


def _part(recipe: Recipe, vectors: Tensor | None, active: list[int] | None) -> Part:
    def part(rows: slice) -> Tensor:
        return _active(recipe.rows(rows) if vectors is None else vectors[:, rows], active)

    return part


def _mix(x: Tensor, weights: Tensor, recipe: Recipe, vectors: Tensor | None, call: Call) -> Mix:
    def vector(i: int | slice) -> Tensor:
        if vectors is not None:
            return vectors[i]
        return recipe.experts[i] if recipe.base is None else recipe.experts[i] - recipe.base

    return Mix(x, weights, recipe.base, vector, recipe.experts.shape[1], call.alpha, call.sparse)
