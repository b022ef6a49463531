"""The merged product by merging weights: slices of `out` rows of E_hat are computed, used and dropped.

    E_hat_g = E_m + alpha * sum_i s_gi T_i        one matrix product over N       [G, out, in]
    y_g     = x_g E_hat_g^T                                                       [G, L, out]

Backward from dy, with H_g = dy_g^T x_g [out, in], slice by slice:

    dx_g = dy_g E_hat_g      dE_m = sum_g H_g      ds_gi = alpha <H_g, T_i>      dT_i = alpha * sum_g s_gi H_g

Saved for it: x, s and the parameters. Cost: 2 G N out in for each of E_hat, ds and dT beside the products with x, and
G out in of memory traffic whatever L is. A slice is [g, rows, in] for g neighbouring groups, and stays in cache from
its first to its last use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from camex_ft.moe.merging.domain_vectors import DomainVectors, DomainVectorsGradient, select
from camex_ft.moe.workspace import workspace

# (tokens of a group at least, groups, elements) of a slice, measured in docs/cost.md: on a CPU few tokens want a slice
# that stays close to the cores, 3 MB in float32, many want taller products; a GPU wants few large ones
SLICES = {"cpu": ((128, 8, 3 << 19), (64, 16, 3 << 19), (0, 16, 3 << 18)), "cuda": ((0, 1 << 20, 1 << 28),)}


class Gradients(NamedTuple):
    """Tensors that the gradients of one product are added to; None where one is not wanted.

    Attributes:
        x: [G, L, in].
        weights: [G, N].
        base: [out, in].
    """

    x: Tensor | None
    weights: Tensor | None
    base: Tensor | None


class Slices:
    """Slices of a merged map of `out` rows: ``rows`` and, within them, ``groups``; ``buffer`` holds one slice."""

    def __init__(self, x: Tensor, out: int, like: Tensor) -> None:
        self.count, length, width = x.shape
        self.out = out
        kinds = SLICES.get(x.device.type, SLICES["cuda"])
        groups, budget = next(kind[1:] for kind in kinds if length >= kind[0])
        self.groups = min(self.count, groups)
        self.height = min(out, max(16, budget // (self.groups * width) // 16 * 16))
        self.width = width
        self._buffer = workspace("slice", (self.groups * self.height * width,), like)

    def rows(self) -> Iterator[slice]:
        """Yield slices of rows."""
        for start in range(0, self.out, self.height):
            yield slice(start, min(start + self.height, self.out))

    def blocks(self) -> Iterator[slice]:
        """Yield slices of groups."""
        for start in range(0, self.count, self.groups):
            yield slice(start, min(start + self.groups, self.count))

    def buffer(self, rows: slice, groups: slice) -> Tensor:
        """Return the memory of one slice; [g, rows, in]."""
        shape = groups.stop - groups.start, rows.stop - rows.start, self.width
        return self._buffer[: shape[0] * shape[1] * shape[2]].view(shape)


def merge_into(out: Tensor, weights: Tensor, base: Tensor | None, part: Tensor, alpha: float) -> Tensor:
    """Write E_m + alpha * s T for rows of some groups: [g, N], [rows, in], [N, rows, in] -> [g, rows, in]."""
    flat = part.flatten(1)  # [N, rows * in]
    if base is None:
        torch.mm(alpha * weights, flat, out=out.view(len(out), -1))
    else:
        torch.addmm(base.reshape(1, -1), weights, flat, alpha=alpha, out=out.view(len(out), -1))
    return out


def merge_forward(x: Tensor, weights: Tensor, vectors: DomainVectors) -> Tensor:
    """Return y_g = x_g E_hat_g^T; [G, L, out] in x's dtype.

    Args:
        x: [G, L, in].
        weights: s, in the experts' dtype; [G, N].
        vectors: domain vectors of the product, computed.
    """
    product = vectors.product
    out, base = product.experts.shape[1], product.base
    s = select(weights, product.active, dim=1)
    y = x.new_empty(*x.shape[:2], out)
    cut = Slices(x, out, s)
    for rows in cut.rows():
        part, base_rows = vectors.rows(rows, vectors.multiplier(rows)), None if base is None else base[rows]
        for groups in cut.blocks():
            merged = merge_into(cut.buffer(rows, groups), s[groups], base_rows, part, product.alpha)
            y[groups, :, rows] = torch.bmm(x[groups], merged.to(x.dtype).mT)
    return y


def merge_backward(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    vectors: DomainVectors,
    into: Gradients,
    dvectors: DomainVectorsGradient | None,
) -> None:
    """Add the gradients of `merge_forward` to `into`, where the base's is set, and those of T to `dvectors`."""
    product = vectors.product
    alpha, base, active = product.alpha, product.base, product.active
    s = select(weights, active, dim=1)
    ds = None if into.weights is None else torch.zeros_like(s)
    cut = Slices(x, dy.shape[-1], s)
    left = _left(s, alpha, base=into.base is not None, vectors=dvectors is not None)
    for rows in cut.rows():
        needed = into.x is not None or ds is not None
        multiplier = vectors.multiplier(rows) if needed or dvectors is not None else None
        part = vectors.rows(rows, multiplier) if needed else None
        base_rows = None if base is None else base[rows]
        products = None
        for groups in cut.blocks():
            dy_part, buffer = dy[groups, :, rows], cut.buffer(rows, groups)
            if into.x is not None and part is not None:
                merged = merge_into(buffer, s[groups], base_rows, part, alpha)
                into.x[groups].baddbmm_(dy_part, merged.to(x.dtype))
            if ds is None and left is None:
                continue
            h = _outer(dy_part, x[groups], buffer)  # H_g [g, rows * in]
            if ds is not None and part is not None:
                ds[groups].addmm_(h, part.flatten(1).mT, alpha=alpha)
            if left is not None:
                products = _add_product(products, left[:, groups], h)  # [N + 1, rows * in]
        if products is not None:
            sums = products.view(len(products), -1, x.shape[-1])
            if into.base is not None:
                into.base[rows] = sums[-1]
            if dvectors is not None:
                dvectors.add_rows(rows, sums[: s.shape[1]], multiplier)
    if into.weights is not None and ds is not None:
        into.weights[:, slice(None) if active is None else active] = ds


def _left(weights: Tensor, alpha: float, *, base: bool, vectors: bool) -> Tensor | None:
    """Return the left factor that turns H [G, ...] into dT and, in a last row, sum_g H_g; [N + 1, G], or less."""
    rows = [weights.mT * alpha] if vectors else []
    if base:
        rows.append(weights.new_ones(1, len(weights)))
    return torch.cat(rows) if rows else None


def _outer(dy: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Return H_g = dy_g^T x_g in the dtype and memory of `out`; [g, rows * in]."""
    if x.dtype == out.dtype:
        torch.bmm(dy.mT, x, out=out)
    else:
        out.copy_(torch.bmm(dy.mT, x))
    return out.view(len(out), -1)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    if total is not None:
        return total.addmm_(left, right)
    return torch.mm(left, right, out=workspace("dvectors", (left.shape[0], right.shape[1]), right))
