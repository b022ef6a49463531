"""Routing and curvature statistics, and the guard of the loss, on numbers made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from camex_ft.moe.context import LayerRouting
from camex_ft.moe.curvature import KINDS, condition_number, distance_from_identity
from camex_ft.training.callbacks.monitoring import LossGuard, RoutingMonitor, curvature_statistics
from camex_ft.upcycling import expert_layers, upcycle
from camex_ft.utils.errors import UserError
from tests.helpers.training_runs import model


def layer(rows: list[list[float]], mask: list[int] | None = None) -> LayerRouting:
    return LayerRouting(torch.tensor(rows), None if mask is None else torch.tensor(mask))


def test_entropy_and_largest_load_by_hand() -> None:
    monitor = RoutingMonitor(torch.nn.Identity())
    monitor.observe({"a": layer([[0.5, 0.5], [1.0, 0.0]]), "b": layer([[0.9, 0.1], [0.2, 0.8]])})
    monitor.observe({"a": layer([[0.0, 1.0], [1.0, 0.0]]), "b": layer([[0.2, 0.8], [0.5, 0.5]], [1, 0])})
    entropy_b = (
        -(0.9 * math.log(0.9) + 0.1 * math.log(0.1) + 2 * (0.2 * math.log(0.2) + 0.8 * math.log(0.8))) / 3
    )
    found = monitor.summary()
    # a: one of four groups has entropy log 2, three go to the first expert (equals count for the first)
    assert found["routing_entropy"] == pytest.approx((math.log(2) / 4 + entropy_b) / 2, rel=1e-6)
    assert found["routing_max_load"] == pytest.approx(0.75)  # b: two of its three that count go to the second
    assert monitor.summary() == {}  # and begins again


def test_weights_that_sum_to_less_than_one_are_scaled() -> None:
    one, two = RoutingMonitor(torch.nn.Identity()), RoutingMonitor(torch.nn.Identity())
    one.observe({"a": layer([[0.1, 0.3], [0.5, 0.5]])})
    two.observe({"a": layer([[0.25, 0.75], [0.5, 0.5]])})
    assert one.summary() == pytest.approx(two.summary(), rel=1e-6)


def test_groups_of_tokens_count_alike() -> None:
    one, two = RoutingMonitor(torch.nn.Identity()), RoutingMonitor(torch.nn.Identity())
    s = torch.rand(2, 3, 4).softmax(-1)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    one.observe({"a": LayerRouting(s, mask)})
    two.observe({"a": LayerRouting(s[mask.bool()], None)})
    assert one.summary() == pytest.approx(two.summary())


def shaken(rank: int, kind: str) -> torch.nn.Module:
    curvature = {"kind": kind, "rank": rank}
    made = upcycle(
        model("dense"), merging={"protocol": "ties-ca", "experts": 3, "curvature": curvature}, seed=1
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".curvature." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_curvature_of_a_layer_is_that_of_its_maps(kind: str, rank: int) -> None:
    made = shaken(rank, kind)
    found = curvature_statistics(made, condition=True)
    assert list(found) == list(expert_layers(made))
    for name, each in expert_layers(made).items():
        up, down = each.up.curvature.factors, each.down.curvature.factors
        mean = (distance_from_identity(up) + distance_from_identity(down)) / 2
        assert found[name]["distance"] == pytest.approx(mean.tolist())
        if rank == 1 or kind == "low-rank":
            worst = torch.maximum(condition_number(up), condition_number(down))
            assert found[name]["condition"] == pytest.approx(worst.tolist())
        else:
            assert "condition" not in found[name]
    largest = max(max(entry["distance"]) for entry in found.values())
    assert RoutingMonitor(made).summary() == {"curvature_distance": largest}


def test_no_curvature_no_statistics() -> None:
    assert curvature_statistics(model("ties")) == {} == curvature_statistics(model("dense"))


# -- the guard


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_step_is_named(bad: float) -> None:
    guard = LossGuard()
    guard.check()
    for step, loss in enumerate([0.5, 0.25, bad, 0.5, bad], 1):
        guard.observe(torch.tensor(loss), step)
    with pytest.raises(UserError, match=r"NaN or infinite at step 3"):
        guard.check()


def test_finite_losses_pass() -> None:
    guard = LossGuard()
    for step in range(1, 4):
        guard.observe(torch.tensor(1e30), step)
        guard.check()
