"""The method written out plainly: the oracle that the fast path in `merge.py` is tested against.

    T_i   = keep_i(tau) * M_i tau_i                tau_i = E_i - E_m                       [N, out, in]
    E_hat = E_m + alpha * sum_i s_i T_i                                                    [G, out, in]
    y     = x E_hat^T                                                                      [G, L, out]

It makes the [G, N, out, in] product on purpose; nothing in training calls it.
Source: CAMEx (arXiv 2502.18821, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from camex_ft.moe import diagonal, low_rank
from camex_ft.moe.factors import Factors
from camex_ft.moe.vectors import Weigh


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
    """Return y = x E_hat^T; arguments and shapes as those of `camex_ft.moe.linear.merged_linear`."""
    vectors = vectors_plain(experts, base, keep, factors)
    if weights.dim() == 3:  # one merged expert a token
        y = merged_linear_plain(
            x.flatten(0, 1).unsqueeze(1), weights.flatten(0, 1), vectors, None, alpha=alpha
        )
        y = y.view(*x.shape[:2], -1)  # [G, L, out]
        return y if base is None else y + x @ base.mT
    merged = alpha * (weights[:, :, None, None] * vectors).sum(1)  # [G, out, in], through [G, N, out, in]
    return x @ (merged if base is None else base + merged).mT
