"""Tuning modes that train routers alone, and routing that is fixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from camex_ft.upcycling import expert_layers, fixed_routing, freeze, upcycle
from camex_ft.utils.errors import UserError
from tests.helpers.invariant_cases import dense, output, shake
from tests.helpers.tiny import inputs_of

HEAD = "sequence-classification"


def upcycled(protocol: str = "domain-ca") -> Any:
    merging = {"protocol": protocol, "experts": 3, "curvature": {"rank": 1}}
    return shake(upcycle(dense("bert", HEAD), merging=merging)).eval()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output(model, inputs_of(model, HEAD)).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["router", "router+curvature"])
def test_routers_are_trained_alone_with_the_gradients_of_full_training(mode: str) -> None:
    model = upcycled()
    whole = gradients(model)
    freeze(model, mode)
    trained = gradients(model)
    parts = (".router.", ".curvature.") if mode == "router+curvature" else (".router.",)
    assert trained.keys() == {name for name in whole if any(part in name for part in parts)}
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-5)  # float32, other products


def test_modes_need_what_they_train() -> None:
    with pytest.raises(UserError, match="router needs layers with experts"):
        freeze(dense("bert", HEAD), "router")
    with pytest.raises(UserError, match="needs a protocol with curvature"):
        freeze(upcycled("smear"), "router+curvature")


@torch.no_grad()
def test_routing_is_fixed_in_the_block_alone_and_by_layer() -> None:
    model = upcycled("smear")
    inputs = inputs_of(model, HEAD)
    free = output(model, inputs)
    first = next(iter(expert_layers(model)))
    with fixed_routing(model, [0.0, 1.0, 0.0]):
        fixed = output(model, inputs)
        with fixed_routing(model, {first: [1.0, 0.0, 0.0]}):
            assert not torch.equal(output(model, inputs), fixed)
        assert torch.equal(output(model, inputs), fixed)
    assert torch.equal(output(model, inputs), free) and not torch.equal(fixed, free)


def test_routing_weights_of_another_number_or_layer_are_refused() -> None:
    model = upcycled()
    with (
        pytest.raises(UserError, match=r"expected 3 numbers, got the shape \[2\]"),
        fixed_routing(model, [0.5, 0.5]),
    ):
        pass
    layer = next(iter(expert_layers(model)))
    with (
        pytest.raises(UserError, match="Did you mean"),
        fixed_routing(model, {layer.replace("encoder", "encodr"): [1.0, 0.0, 0.0]}),
    ):
        pass
    with pytest.raises(UserError, match="has no experts"), fixed_routing(dense("bert", HEAD), [1.0]):
        pass
