"""The merged map by mixing products: nothing is merged, which is cheaper where a group has few tokens.

    y_g = x_g E_m^T + alpha * sum_i (s_gi x_g) T_i^T

    dx_g = dy_g E_m + alpha * sum_i s_gi dy_g T_i        ds_gi = alpha <dy_g T_i, x_g>
    dE_m = sum_g dy_g^T x_g                              dT_i  = alpha * sum_g (s_gi dy_g)^T x_g

Exact, as merging is. On a CPU experts take turns, and a group that does not use an expert (a zero of sparse weights) is
left out of its products: k + 1 dense maps. Elsewhere, where to find such groups would make the device wait, all experts
are one product over (expert, in): N + 1 dense maps. Sums over experts are kept in the wider of the two dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from camex_ft.moe.merging.merge_weights import Gradients


class Receiver(Protocol):
    """Receives the gradient of T."""

    def product(self, i: int, left: Tensor, right: Tensor) -> None:
        """Take dT_i = left right; [out, m], [m, in]."""

    def all(self, grad: Tensor) -> None:
        """Take dT; [N, out, in]."""


class Mix(NamedTuple):
    """One mixed product.

    Attributes:
        x: [G, L, in].
        weights: s, in the experts' dtype; [G, N].
        base: [out, in] or None.
        vector: i -> T_i [out, in]; all of them -> T [N, out, in].
        out: width of the result.
        alpha: merging step size.
        sparse: zeros of the weights take no part.
    """

    x: Tensor
    weights: Tensor
    base: Tensor | None
    vector: Callable[[int | slice], Tensor]
    out: int
    alpha: float
    sparse: bool

    @property
    def wide(self) -> torch.dtype:
        """Dtype of sums over experts."""
        return torch.promote_types(self.x.dtype, self.weights.dtype)

    @property
    def scale(self) -> Tensor:
        """alpha * s in x's dtype; [G, 1, N]."""
        return (self.alpha * self.weights).to(self.x.dtype).unsqueeze(1)

    @property
    def at_once(self) -> bool:
        """Return whether all experts are one product."""
        return self.x.device.type != "cpu"

    def users(self) -> Iterator[tuple[int, Tensor | None]]:
        """Yield (i, the groups that use expert i; None where all do); experts without any are left out."""
        for i in range(self.weights.shape[1]):
            groups = self.weights[:, i].nonzero().squeeze(1) if self.sparse else None
            if groups is None or len(groups) == len(self.weights):
                yield i, None
            elif len(groups):
                yield i, groups

    def stacked(self) -> Tensor:
        """Return [T_1 ... T_N] in x's dtype; [out, N * in]."""
        return self.vector(slice(None)).transpose(0, 1).flatten(1).to(self.x.dtype)


def mix_forward(mix: Mix) -> Tensor:
    """Return y; [G, L, out] in x's dtype."""
    x, (groups, length, _) = mix.x, mix.x.shape
    if mix.base is None:
        y = x.new_zeros(groups, length, mix.out, dtype=mix.wide)
    else:
        y = (x @ mix.base.to(x.dtype).mT).to(mix.wide)
    if mix.at_once:
        scaled = (x.unsqueeze(2) * mix.scale.unsqueeze(-1)).flatten(2)  # [G, L, N * in]
        return y.add_(scaled @ mix.stacked().mT).to(x.dtype)
    for i, used in mix.users():
        scaled = (_of(x, used) * _of(mix.scale[..., i : i + 1], used)).flatten(0, 1)  # [g * L, in]
        vector = mix.vector(i).to(x.dtype)
        if used is None and y.dtype == x.dtype:
            y.view(-1, mix.out).addmm_(scaled, vector.mT)
        else:
            _add(y, used, (scaled @ vector.mT).view(-1, length, mix.out))
    return y.to(x.dtype)


def mix_backward(dy: Tensor, mix: Mix, into: Gradients, take: Receiver | None) -> None:
    """Add the gradients of `mix_forward` to `into`, where the base's is set; `take` receives those of T."""
    x = mix.x
    dx = None if into.x is None else into.x.to(mix.wide)
    if dx is not None and mix.base is not None:
        dx += dy @ mix.base.to(x.dtype)
    if into.base is not None:
        into.base.copy_(dy.flatten(0, 1).mT @ x.flatten(0, 1))
    if mix.at_once:
        _backward_at_once(dy, mix, dx, into.weights, take)
    else:
        for i, used in mix.users():
            _backward_one(dy, mix, i, used, dx, into.weights, take)
    if into.x is not None and dx is not None and dx is not into.x:
        into.x.copy_(dx)


def _backward_one(
    dy: Tensor,
    mix: Mix,
    i: int,
    used: Tensor | None,
    dx: Tensor | None,
    dweights: Tensor | None,
    take: Receiver | None,
) -> None:
    dy, x, scale = _of(dy, used), _of(mix.x, used), _of(mix.scale[..., i : i + 1], used)
    if dx is not None or dweights is not None:
        back = dy @ mix.vector(i).to(x.dtype)  # dy T_i [g, L, in]
        if dweights is not None:
            inner = torch.linalg.vecdot(back, x).sum(1, keepdim=True, dtype=dweights.dtype)  # [g, 1]
            _add(dweights[:, i : i + 1], used, mix.alpha * inner)
        if dx is not None:
            _add(dx, used, back.mul_(scale))
    if take is not None:
        take.product(i, dy.flatten(0, 1).mT, (x * scale).flatten(0, 1))


def _backward_at_once(
    dy: Tensor, mix: Mix, dx: Tensor | None, dweights: Tensor | None, take: Receiver | None
) -> None:
    x, experts = mix.x, mix.weights.shape[1]
    if dx is not None or dweights is not None:
        back = (dy @ mix.stacked()).unflatten(2, (experts, -1))  # dy T_i [G, L, N, in]
        if dweights is not None:
            inner = torch.linalg.vecdot(back, x.unsqueeze(2)).sum(1, dtype=dweights.dtype)  # [G, N]
            dweights.add_(inner, alpha=mix.alpha)
        if dx is not None:
            dx += (mix.scale.unsqueeze(2) @ back).squeeze(2)  # [G, 1, 1, N] [G, L, N, in]
    if take is not None:
        scaled = (x.unsqueeze(2) * mix.scale.unsqueeze(-1)).flatten(2).flatten(0, 1)  # [G * L, N * in]
        made = (dy.flatten(0, 1).mT @ scaled).unflatten(1, (experts, -1))  # [out, N, in]
        take.all(made.transpose(0, 1))


def _of(tensor: Tensor, groups: Tensor | None) -> Tensor:
    return tensor if groups is None else tensor[groups]


def _add(total: Tensor, groups: Tensor | None, part: Tensor) -> None:
    if groups is None:
        total += part
    else:
        total.index_add_(0, groups, part.to(total.dtype))
