"""Reference implementation of the method, which the fast path in `functional` is tested against.

    T_i   = multiplier_i(tau) * M_i tau_i          tau_i = E_i - E_m                       [N, out, in]
    E_hat = E_m + alpha * sum_i s_i T_i                                                    [G, out, in]
    y     = x E_hat^T                                                                      [G, L, out]

`merged_linear_reference` computes the [G, N, out, in] product on purpose; only tests and benchmarks call it.
`merged_linear_traced` serves `torch.export` and the transforms of `torch.func`, which follow each operation: the same
formula with autograd's own backward pass, and without reused buffers.
Source: CAMEx (arXiv 2502.18821, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from camex_ft.moe.curvature.base import Factors
from camex_ft.moe.curvature.diagonal import DiagonalFactors
from camex_ft.moe.curvature.low_rank import LowRankFactors
from camex_ft.moe.merging.domain_vectors import MergedProduct


def merged_linear_reference(x: Tensor, weights: Tensor, product: MergedProduct) -> Tensor:
    """Return y = x E_hat^T; arguments and shapes as those of `camex_ft.moe.merging.functional.merged_linear`."""
    vectors, base = transform_reference(product), product.base
    tokenwise = weights.dim() == 3  # one merged expert a token
    rows, s = (x.flatten(0, 1).unsqueeze(1), weights.flatten(0, 1)) if tokenwise else (x, weights)
    merged = product.alpha * (s[:, :, None, None] * vectors).sum(1)  # [G, out, in], through [G, N, out, in]
    if tokenwise:
        y = (rows @ merged.mT).view(*x.shape[:2], -1)  # [G, L, out]
        return y if base is None else y + x @ base.mT
    return x @ (merged if base is None else base + merged).mT


def merged_linear_traced(x: Tensor, weights: Tensor, product: MergedProduct) -> tuple[Tensor, Tensor]:
    """Return y = x E_hat^T and the mean of T over the experts; arguments and shapes as those of `merged_linear`.

    Groups of tokens have E_hat merged, [G, out, in]; where each token is a group, outputs of the T_i are mixed.
    """
    vectors, base, alpha = transform_reference(product), product.base, product.alpha  # [N, out, in]
    if weights.dim() == 3:
        outputs = torch.einsum("gli,noi->glno", x, vectors.to(x.dtype))
        y = alpha * (weights.to(x.dtype).unsqueeze(-1) * outputs).sum(2)  # [G, L, out]
        return (y if base is None else y + x @ base.to(x.dtype).mT), vectors.mean(0)
    merged = alpha * (weights.to(vectors.dtype) @ vectors.flatten(1)).unflatten(1, vectors.shape[1:])
    merged = merged if base is None else base + merged
    return x @ merged.to(x.dtype).mT, vectors.mean(0)


def transform_reference(product: MergedProduct) -> Tensor:
    """Return T [N, out, in]: transformed domain vectors, or the experts themselves where there is no base."""
    if product.base is None:
        return product.experts
    tau = product.experts - product.base
    multiplier = None if product.multiplier is None else product.multiplier(tau.detach())
    vectors = tau if product.factors is None else curvature_reference(tau, product.factors)
    return vectors if multiplier is None else multiplier * vectors


def curvature_reference(tau: Tensor, factors: Factors) -> Tensor:
    """Return M_i tau_i, in the way of the factors' kind; [N, out, in]."""
    if isinstance(factors, DiagonalFactors):
        return torch.einsum("rno,rni->noi", *factors) * tau
    if isinstance(factors, LowRankFactors):
        left, right = _plus_identity(factors.u, factors.v), _plus_identity(factors.p, factors.q)
        return left @ tau @ right.mT
    return _kronecker(tau, *factors)


def _plus_identity(left: Tensor, right: Tensor) -> Tensor:
    """Return I + sum_r left_r right_r^T; [N, k, k]."""
    eye = torch.eye(left.shape[-1], dtype=left.dtype, device=left.device)
    return eye + torch.einsum("rni,rnj->nij", left, right)


def _kronecker(tau: Tensor, *factors: Tensor) -> Tensor:
    """View tau as [N, a1, a2, c1, c2] and multiply along each axis."""
    view = tau.reshape(tau.shape[0], *(f.shape[-1] for f in factors))  # [N, a1, a2, c1, c2]
    total = torch.zeros_like(view)
    for a1, a2, c1, c2 in zip(*factors, strict=True):
        term = torch.einsum("nai,nijkl->najkl", a1, view)
        term = torch.einsum("nbj,najkl->nabkl", a2, term)
        term = torch.einsum("nck,nabkl->nabcl", c1, term)
        total = total + torch.einsum("ndl,nabcl->nabcd", c2, term)
    return total.reshape(tau.shape)
