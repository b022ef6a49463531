"""Experts that are set apart before training: which entries are drawn anew, from what, and which stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camex_ft.moe.context import RoutingContext
from camex_ft.moe.layers.ffn import ExpertFFN, MergedFFN
from camex_ft.upcycling.expert_init import add_noise, drop_units
from tests.helpers.expert_layers import EXPERTS, HIDDEN, maps, read, settings

INNER = 400


def dense(*, gated: bool, bias: bool = True) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Maps whose units have means and spreads of their own, so that statistics of other units would show."""
    generator = torch.Generator().manual_seed(0)

    def one(out: int, width: int, shift: float) -> tuple[Tensor, Tensor | None]:
        weight = shift + (1 + shift) * torch.randn(out, width, generator=generator)
        return weight, shift - torch.rand(out, generator=generator) if bias else None

    made = {"up": one(INNER, HIDDEN, 0.5), "down": one(HIDDEN, INNER, 2.0)}
    return made | ({"gate": one(INNER, HIDDEN, -0.5)} if gated else {})


def layer(weights: dict[str, Any]) -> ExpertFFN:
    given = {"name": "layer", "stack": "encoder", "context": RoutingContext(read), "settings": settings()}
    return MergedFFN(weights, nn.GELU(), **given)


def changed(layer: ExpertFFN, weights: dict[str, Any], i: int) -> dict[str, set[int]]:
    """The units of expert i that differ from the dense layer, by map, and of biases by map and "bias"."""
    found = {}
    for name, (weight, bias) in weights.items():
        linear, dim = getattr(layer, name), 0 if name == "down" else 1
        differs = linear.experts[i] != weight
        assert torch.equal(differs.any(dim), differs.all(dim))  # whole units
        found[name] = set(differs.any(dim).nonzero().flatten().tolist())
        if bias is not None and name != "down":
            found[name + " bias"] = set((linear.expert_bias[i] != bias).nonzero().flatten().tolist())
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.0013, 0.25, 1.0])
def test_a_share_of_every_expert_s_units_is_drawn_anew(gated: bool, bias: bool, share: float) -> None:
    weights = dense(gated=gated, bias=bias)
    made = layer(weights)
    torch.manual_seed(3)
    drop_units([made], share)
    sets = []
    for i in range(EXPERTS):
        units, *same = changed(made, weights, i).values()
        assert len(units) == round(share * INNER)
        if len(units) > 1:  # one bias is drawn with a standard deviation of 0
            assert all(other == units for other in same)
        sets.append(units)
    assert share in (0.0, 1.0) or sets[0] != sets[1]
    for name, (weight, at) in weights.items():  # base and the bias of `down` stay
        linear = getattr(made, name)
        assert torch.equal(linear.base, weight)
        assert at is None or torch.equal(linear.base_bias, at)
    if bias:
        assert torch.equal(made.down.expert_bias, weights["down"][1].expand(EXPERTS, -1))
    assert all(p.isfinite().all() for p in made.parameters())


def test_what_is_drawn_has_the_statistics_of_what_was_there() -> None:
    weights = dense(gated=True)
    made = layer(weights)
    torch.manual_seed(3)
    drop_units([made], 0.5)
    for name in ("up", "gate", "down"):
        for i in range(EXPERTS):
            weight, now = weights[name][0], getattr(made, name).experts[i].detach()
            new = now != weight
            old, drawn = weight[new], now[new]  # 1,200 entries
            # standard errors: std / sqrt(1200) = 0.029 std, and std / sqrt(2400) = 0.02 std; five of them
            assert abs(drawn.mean() - old.mean()) < 0.15 * old.std()
            assert drawn.std() == pytest.approx(old.std().item(), rel=0.1)
            assert abs(drawn.mean()) > 0.15 * old.std()  # 0 is not their mean


def test_a_seed_draws_the_same() -> None:
    def drawn(seed: int) -> Tensor:
        made = layer(maps(gated=True))
        torch.manual_seed(seed)
        drop_units([made], 0.5)
        return made.gate.experts

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_low_precision_statistics_are_not_taken_in_low_precision() -> None:
    weights = {name: (w.to(torch.bfloat16), None) for name, (w, _) in dense(gated=False).items()}
    made = layer(weights)
    drop_units([made], 1.0)
    assert made.up.experts.dtype == torch.bfloat16
    # 7,200 entries of standard deviation 1.5: five standard errors, and bfloat16 rounds by 2^-9 without a bias
    assert abs(made.up.experts.float().mean() - weights["up"][0].float().mean()) < 0.09


def test_noise_is_relative_to_the_spread() -> None:
    weights = dense(gated=False)
    made = layer(weights)
    add_noise([made], 0.2)
    for name, (weight, _) in weights.items():
        added = getattr(made, name).experts.detach() - weight
        assert (added.std() / weight.std()).item() == pytest.approx(0.2, rel=0.1)
        assert torch.equal(getattr(made, name).base, weight)
