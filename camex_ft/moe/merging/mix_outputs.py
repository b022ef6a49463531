"""The merged product by mixing outputs: nothing is merged, which is cheaper where a group has few tokens.

    y_g = x_g E_m^T + alpha * sum_i (s_gi x_g) T_i^T

    dx_g = dy_g E_m + alpha * sum_i s_gi dy_g T_i        ds_gi = alpha <dy_g T_i, x_g>
    dE_m = sum_g dy_g^T x_g                              dT_i  = alpha * sum_g (s_gi dy_g)^T x_g

Exact, as merging is. On a CPU experts take turns, and a group that does not use an expert (a zero of sparse weights) is
left out of its products: k + 1 dense maps. On other devices, where finding such groups would make the device wait, all
experts are one product over (expert, in): N + 1 dense maps. Sums over experts have the wider of the two dtypes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from camex_ft.moe.merging.domain_vectors import DomainVectors, DomainVectorsGradient
from camex_ft.moe.merging.merge_weights import Gradients
from camex_ft.moe.workspace import workspace


def mix_forward(x: Tensor, weights: Tensor, vectors: DomainVectors) -> Tensor:
    """Return y; [G, L, out] in x's dtype.

    Args:
        x: [G, L, in].
        weights: s, in the experts' dtype; [G, N].
        vectors: domain vectors of the product, computed.
    """
    product, (groups, length, _) = vectors.product, x.shape
    out, base, wide = product.experts.shape[1], product.base, _wide(x, weights)
    if base is None:
        y = x.new_zeros(groups, length, out, dtype=wide)
    else:
        y = (x @ base.to(x.dtype).mT).to(wide)
    scale = _scale(x, weights, product.alpha)
    if at_once(x):
        scaled = (x.unsqueeze(2) * scale.unsqueeze(-1)).flatten(2)  # [G, L, N * in]
        return y.add_(scaled @ _stacked(vectors, x.dtype).mT).to(x.dtype)
    for i, users in _users(weights, sparse=product.sparse):
        scaled = (_of(x, users) * _of(scale[..., i : i + 1], users)).flatten(0, 1)  # [g * L, in]
        vector = _vector(vectors, i).to(x.dtype)
        if users is None and y.dtype == x.dtype:
            y.view(-1, out).addmm_(scaled, vector.mT)
        else:
            _add(y, users, (scaled @ vector.mT).view(-1, length, out))
    return y.to(x.dtype)


def mix_backward(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    vectors: DomainVectors,
    into: Gradients,
    dvectors: DomainVectorsGradient | None,
) -> None:
    """Add the gradients of `mix_forward` to `into`, where the base's is set, and those of T to `dvectors`."""
    product, scale = vectors.product, _scale(x, weights, vectors.product.alpha)
    dx = None if into.x is None else into.x.to(_wide(x, weights))
    if dx is not None and product.base is not None:
        dx += dy @ product.base.to(x.dtype)
    if into.base is not None:
        into.base.copy_(dy.flatten(0, 1).mT @ x.flatten(0, 1))
    inputs = dx is not None or into.weights is not None
    if at_once(x):
        if inputs:
            back = (dy @ _stacked(vectors, x.dtype)).unflatten(
                2, (weights.shape[1], -1)
            )  # dy T_i [G, L, N, in]
            if into.weights is not None:
                inner = torch.linalg.vecdot(back, x.unsqueeze(2)).sum(1, dtype=into.weights.dtype)  # [G, N]
                into.weights.add_(inner, alpha=product.alpha)
            if dx is not None:
                dx += (scale.unsqueeze(2) @ back).squeeze(2)  # [G, 1, 1, N] [G, L, N, in]
        if dvectors is not None:
            scaled = (x.unsqueeze(2) * scale.unsqueeze(-1)).flatten(2).flatten(0, 1)  # [G * L, N * in]
            grad = (dy.flatten(0, 1).mT @ scaled).unflatten(1, (weights.shape[1], -1)).transpose(0, 1)
            dvectors.grad.add_(grad) if dvectors.shared else dvectors.grad.copy_(grad)
    else:
        for i, users in _users(weights, sparse=product.sparse):
            dy_i, x_i, scale_i = _of(dy, users), _of(x, users), _of(scale[..., i : i + 1], users)
            if inputs:
                back = dy_i @ _vector(vectors, i).to(x.dtype)  # dy T_i [g, L, in]
                if into.weights is not None:
                    inner = torch.linalg.vecdot(back, x_i).sum(
                        1, keepdim=True, dtype=into.weights.dtype
                    )  # [g, 1]
                    _add(into.weights[:, i : i + 1], users, product.alpha * inner)
                if dx is not None:
                    _add(dx, users, back.mul_(scale_i))
            if dvectors is not None:
                left, right = dy_i.flatten(0, 1).mT, (x_i * scale_i).flatten(0, 1)
                _add_product(dvectors.grad[i], left, right, add=dvectors.shared)
    if into.x is not None and dx is not None and dx is not into.x:
        into.x.copy_(dx)


def at_once(x: Tensor) -> bool:
    """Return whether all experts are one product."""
    return x.device.type != "cpu"


def _wide(x: Tensor, weights: Tensor) -> torch.dtype:
    """Return the dtype of sums over experts."""
    return torch.promote_types(x.dtype, weights.dtype)


def _scale(x: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Return alpha * s in x's dtype; [G, 1, N]."""
    return (alpha * weights).to(x.dtype).unsqueeze(1)


def _users(weights: Tensor, *, sparse: bool) -> Iterator[tuple[int, Tensor | None]]:
    """Yield (i, the groups that use expert i; None where all do); experts without any are left out."""
    for i in range(weights.shape[1]):
        groups = weights[:, i].nonzero().squeeze(1) if sparse else None
        if groups is None or len(groups) == len(weights):
            yield i, None
        elif len(groups):
            yield i, groups


def _vector(vectors: DomainVectors, i: int | slice) -> Tensor:
    """Return T_i [out, in], or all of T."""
    if vectors.whole is not None:
        return vectors.whole[i]
    experts, base = vectors.product.experts[i], vectors.product.base
    if base is None:
        return experts
    return torch.sub(experts, base, out=workspace("vector", tuple(experts.shape), experts))


def _stacked(vectors: DomainVectors, dtype: torch.dtype) -> Tensor:
    """Return [T_1 ... T_N]; [out, N * in]."""
    return _vector(vectors, slice(None)).transpose(0, 1).flatten(1).to(dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    """Set or add dT_i = left right; [out, m], [m, in]."""
    if left.dtype != total.dtype:
        product = left @ right
        total.copy_(total + product if add else product)
    elif add:
        total.addmm_(left, right)
    else:
        torch.mm(left, right, out=total)


def _of(tensor: Tensor, groups: Tensor | None) -> Tensor:
    return tensor if groups is None else tensor[groups]


def _add(total: Tensor, groups: Tensor | None, part: Tensor) -> None:
    if groups is None:
        total += part
    else:
        total.index_add_(0, groups, part.to(total.dtype))
