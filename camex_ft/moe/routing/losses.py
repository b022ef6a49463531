"""Balance loss and z-loss of a layer, from sums over groups, which add up over processes.

Balance loss: coef * (cv^2(importance) + cv^2(load)) of one layer, from its routing.

    importance_i = sum_g s_gi                                                                    [N]
    load_i       = sum_g P(expert i among the k largest if its noise alone were drawn again)     [N]
                   while training with noise and k < N; else the number of groups with s_gi > 0
    cv^2(v)      = var(v) / (mean(v)^2 + 1e-10), with the unbiased variance

Z-loss: coef * mean over groups of (logsumexp_i logits_gi)^2, on logits without noise and before the temperature; it
keeps them small.

Sources: Shazeer et al. 2017 (arXiv 1701.06538, section 4 and appendix A); ST-MoE, Zoph et al. 2022 (arXiv 2202.08906,
section 3.2) for the z-loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from camex_ft.moe.routing.router import Routing

EPSILON = 1e-10


def cv_squared(v: Tensor) -> Tensor:
    """Return the squared coefficient of variation of a vector, as a scalar; 0 for fewer than two entries."""
    if v.numel() < 2:
        return v.new_zeros(())
    return v.var() / (v.mean() ** 2 + EPSILON)


def smooth_load(routing: Routing, *, top_k: int) -> Tensor:
    """Return P(expert i stays among the k largest) per group; [G, N], differentiable in logits and noise scale.

    Needs noise and top_k < N. An expert inside the k largest is held against the (k+1)-th noisy logit, one outside
    against the k-th.
    """
    assert routing.noisy is not None and routing.scale is not None
    largest = routing.noisy.topk(top_k + 1, dim=-1).values  # [G, k + 1]
    inside = routing.noisy > largest[..., -1:]
    threshold = torch.where(inside, largest[..., -1:], largest[..., -2:-1])  # [G, N]
    return torch.special.ndtr((routing.logits - threshold) / routing.scale)


def load(routing: Routing, *, top_k: int) -> Tensor:
    """Return the load of each group on each expert; [G, N]: smooth where noise was drawn and k < N, else 0 or 1."""
    if routing.noisy is not None and top_k < routing.logits.shape[-1]:
        return smooth_load(routing, top_k=top_k)
    return (routing.weights > 0).to(routing.weights.dtype)


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """Sums that one layer's losses are computed from.

    Attributes:
        importance, load: sums over the groups that count; [N], with their graphs.
        squares: sum over the same of logsumexp(logits)^2; a scalar.
        groups: their number; a scalar.
        coef, z_coef: weights of balance loss and z-loss.
    """

    importance: Tensor
    load: Tensor
    squares: Tensor
    groups: Tensor
    coef: float
    z_coef: float

    def loss(self) -> Tensor:
        """Return balance loss + z-loss, a scalar."""
        loss = self.importance.new_zeros(())
        if self.coef:
            loss = loss + self.coef * (cv_squared(self.importance) + cv_squared(self.load))
        if self.z_coef:
            loss = loss + self.z_coef * self.squares / self.groups.clamp_min(1)
        return loss

    def flat(self) -> Tensor:
        """Return all sums as one vector; [2 N + 2]."""
        return torch.cat([self.importance, self.load, self.squares.view(1), self.groups.view(1)])

    def of(self, flat: Tensor) -> LossSums:
        """Return the same with sums from a vector in the form of `flat`."""
        n = len(self.importance)
        importance, load, squares, groups = flat.split([n, n, 1, 1])
        return replace(
            self, importance=importance, load=load, squares=squares.squeeze(0), groups=groups.squeeze(0)
        )


def sum_losses(
    routing: Routing, *, top_k: int, coef: float, z_coef: float = 0.0, mask: Tensor | None = None
) -> LossSums:
    """Return the sums that a layer's losses are computed from.

    Args:
        routing: of one layer; [..., N].
        top_k: k.
        coef, z_coef: weights of balance loss and z-loss.
        mask: 1 for groups that hold a token, 0 for groups of padding; [...]; None counts all.
    """
    experts = routing.weights.shape[-1]
    weights, loads = routing.weights, load(routing, top_k=top_k)
    count = weights.new_ones(weights.shape[:-1]).sum() if mask is None else (mask != 0).sum()
    if mask is not None:
        padding = (mask == 0).unsqueeze(-1)
        weights, loads = weights.masked_fill(padding, 0), loads.masked_fill(padding, 0)
    return LossSums(
        importance=weights.reshape(-1, experts).sum(0),
        load=loads.reshape(-1, experts).sum(0),
        squares=_squares(routing, mask) if z_coef else weights.new_zeros(()),
        groups=count.to(weights.dtype),
        coef=coef,
        z_coef=z_coef,
    )


def _squares(routing: Routing, mask: Tensor | None) -> Tensor:
    if mask is None:
        return routing.logits.logsumexp(dim=-1).square().sum()
    real = mask != 0
    # filled before, not after: a gradient of 0 through the NaN that padding may hold is NaN
    logits = routing.logits.masked_fill(~real.unsqueeze(-1), 0)
    return torch.where(real, logits.logsumexp(dim=-1).square(), 0).sum()
