"""Expert initialisation beyond copies: noise, units drawn anew. The base expert stays as it is.

    noise   E_i += N(0, (r std)^2), with the standard deviation of the matrix. Of experts of low rank B_i is drawn, such
            that the entries of c B_i A_i have that standard deviation
    drop    for every expert, q = round(r f) of the f inner units are drawn anew: rows of `up` and `gate` with their
            biases, columns of `down`, each from a normal distribution with the mean and the standard deviation of
            these entries of the same matrix. The three share the units, and no two experts draw the same ones but by
            chance.

Convention of `drop`: units keep their places, since experts are merged unit by unit with the base; published code also
shuffles them, which changes nothing where outputs are mixed. The bias of `down` belongs to no unit and stays. Standard
deviations are those of the entries themselves (no n - 1), so that one entry has one.

Source: Drop-Upcycling, Nakamura et al. 2025 (arXiv 2502.19261, section 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from camex_ft.config import UpcycleConfig
from camex_ft.moe.layers.ffn import ExpertFFN
from camex_ft.moe.layers.low_rank_expert_linear import LowRankLinear


def set_experts_apart(layers: Sequence[ExpertFFN], upcycle: UpcycleConfig) -> None:
    """Make the experts differ as ``upcycle.init`` says: of a model that is upcycled, not of a saved one."""
    if upcycle.init == "noise":
        add_noise(layers, upcycle.noise)
    elif upcycle.init == "drop":
        drop_units(layers, upcycle.drop)


@torch.no_grad()
def add_noise(layers: Iterable[ExpertFFN], relative: float) -> None:
    """Add noise to every expert, of `relative` times the standard deviation of the dense matrix or bias."""
    for layer in layers:
        for linear in _linears(layer):
            if isinstance(linear, LowRankLinear):
                _add_low_rank(linear, relative)
            else:
                _add(linear.experts, relative)
            if linear.expert_bias is not None:
                _add(linear.expert_bias, relative)


@torch.no_grad()
def drop_units(layers: Iterable[ExpertFFN], share: float) -> None:
    """Draw a share, 0 to 1, of every expert's inner units anew; experts must be whole matrices."""
    for layer in layers:
        experts, inner = layer.up.experts.shape[:2]
        for i in range(experts):
            units = torch.randperm(inner)[: round(share * inner)]
            for linear in _linears(layer):
                _draw(linear.experts[i], units, dim=1 if linear is layer.down else 0)
                if linear.expert_bias is not None and linear is not layer.down:
                    _draw(linear.expert_bias[i], units, dim=0)


def _add(tensor: Tensor, relative: float) -> None:
    tensor.add_(torch.randn_like(tensor) * (relative * tensor[0].std()))


def _add_low_rank(linear: LowRankLinear, relative: float) -> None:
    """Draw B with the variance that gives c B A the wanted one: var(c B A) = c^2 r var(B) var(A)."""
    low_rank = linear.low_rank
    one = low_rank.scale * low_rank.rank**0.5 * linear.expert_in.std()
    linear.expert_out.normal_().mul_(relative * linear.base.std() / one)


def _draw(tensor: Tensor, units: Tensor, *, dim: int) -> None:
    """Draw rows (dim 0) or columns (dim 1) of an expert's matrix anew, in place, by the statistics that they have."""
    if len(units) == 0:
        return
    units = units.to(tensor.device)
    old = tensor.index_select(dim, units)
    wide = old.to(torch.promote_types(old.dtype, torch.float32))
    std, mean = torch.std_mean(wide, correction=0)
    tensor.index_copy_(dim, units, (torch.randn_like(wide) * std + mean).to(old.dtype))


def _linears(layer: ExpertFFN) -> list[Any]:
    return [linear for linear in (layer.up, layer.gate, layer.down) if linear is not None]
