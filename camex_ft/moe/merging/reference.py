"""The method written out plainly: the oracle that the fast path in `functional` is tested against.

    T_i   = keep_i(tau) * M_i tau_i                tau_i = E_i - E_m                       [N, out, in]
    E_hat = E_m + alpha * sum_i s_i T_i                                                    [G, out, in]
    y     = x E_hat^T                                                                      [G, L, out]

`merged_linear_plain` makes the [G, N, out, in] product on purpose; nothing but tests and benchmarks calls it.
`merged_linear_traced` is what `torch.export` and the transforms of `torch.func` see, which follow each operation: the
same formula with autograd's own backward pass, and without buffers that are used again.
Source: CAMEx (arXiv 2502.18821, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from camex_ft.moe.curvature import diagonal, low_rank
from camex_ft.moe.curvature.base import Factors
from camex_ft.moe.merging.domain_vectors import Weigh


def traced() -> bool:
    """Return whether `torch.export` or a transform of `torch.func` follows the operations."""
    # nothing public tells of torch.func; torch's own `autograd.Function.apply` asks the same (2.13)
    return torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()


def merged_linear_traced(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    base: Tensor | None,
    *,
    alpha: float,
    keep: Weigh | None,
    factors: Factors | None,
) -> tuple[Tensor, Tensor]:
    """Return y = x E_hat^T and the mean of T over the experts; arguments and shapes as those of `merged_linear`.

    Groups of tokens have E_hat merged, [G, out, in]; where each token is a group, outputs of the T_i are mixed.
    """
    vectors = vectors_plain(experts, base, keep, factors)  # [N, out, in]
    if weights.dim() == 3:
        each = torch.einsum("gli,noi->glno", x, vectors.to(x.dtype))
        y = alpha * (weights.to(x.dtype).unsqueeze(-1) * each).sum(2)  # [G, L, out]
        return (y if base is None else y + x @ base.to(x.dtype).mT), vectors.mean(0)
    merged = alpha * (weights.to(experts.dtype) @ vectors.flatten(1)).unflatten(1, experts.shape[1:])
    merged = merged if base is None else base + merged
    return x @ merged.to(x.dtype).mT, vectors.mean(0)


def curve_plain(tau: Tensor, factors: Factors) -> Tensor:
    """Return M_i tau_i, in the way of the factors' kind; [N, out, in]."""
    if isinstance(factors, diagonal.Factors):
        return torch.einsum("rno,rni->noi", *factors) * tau
    if isinstance(factors, low_rank.Factors):
        left, right = _plus_identity(factors.u, factors.v), _plus_identity(factors.p, factors.q)
        return left @ tau @ right.mT
    return _curve_kronecker(tau, *factors)


def _plus_identity(left: Tensor, right: Tensor) -> Tensor:
    """Return I + sum_r left_r right_r^T; [N, k, k]."""
    eye = torch.eye(left.shape[-1], dtype=left.dtype, device=left.device)
    return eye + torch.einsum("rni,rnj->nij", left, right)


def _curve_kronecker(tau: Tensor, *factors: Tensor) -> Tensor:
    """View tau as [N, a1, a2, c1, c2] and multiply along each axis."""
    view = tau.reshape(tau.shape[0], *(f.shape[-1] for f in factors))  # [N, a1, a2, c1, c2]
    total = torch.zeros_like(view)
    for a1, a2, c1, c2 in zip(*factors, strict=True):
        term = torch.einsum("nai,nijkl->najkl", a1, view)
        term = torch.einsum("nbj,najkl->nabkl", a2, term)
        term = torch.einsum("nck,nabkl->nabcl", c1, term)
        total = total + torch.einsum("ndl,nabcl->nabcd", c2, term)
    return total.reshape(tau.shape)


def vectors_plain(
    experts: Tensor, base: Tensor | None, keep: Weigh | None, factors: Factors | None
) -> Tensor:
    """Return T [N, out, in]: kept and curved domain vectors, or the experts themselves where there is no base."""
    if base is None:
        return experts
    tau = experts - base
    kept = None if keep is None else keep(tau.detach())
    curved = tau if factors is None else curve_plain(tau, factors)
    return curved if kept is None else kept * curved


def merged_linear_plain(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    base: Tensor | None,
    *,
    alpha: float = 1.0,
    keep: Weigh | None = None,
    factors: Factors | None = None,
) -> Tensor:
    """Return y = x E_hat^T; arguments and shapes as those of `camex_ft.moe.merging.functional.merged_linear`."""
    vectors = vectors_plain(experts, base, keep, factors)
    if weights.dim() == 3:  # one merged expert a token
        y = merged_linear_plain(
            x.flatten(0, 1).unsqueeze(1), weights.flatten(0, 1), vectors, None, alpha=alpha
        )
        y = y.view(*x.shape[:2], -1)  # [G, L, out]
        return y if base is None else y + x @ base.mT
    merged = alpha * (weights[:, :, None, None] * vectors).sum(1)  # [G, out, in], through [G, N, out, in]
    return x @ (merged if base is None else base + merged).mT
