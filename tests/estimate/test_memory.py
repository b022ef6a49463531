"""Memory of a training step against what torch holds: the optimizer to the byte, activations to a tolerance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from camex_ft.estimate.activations import saved as planned_saved
from camex_ft.estimate.memory import memory
from camex_ft.estimate.survey import Precision, survey
from camex_ft.upcycling import expert_layers, freeze, upcycle
from tests.helpers.estimate_sizes import CASES, CLASSIFIER, SEGMENT, batch, inputs, small

CHECKPOINTED = {"use_reentrant": False}


def saved(model: Any, head: str) -> int:
    """Bytes that autograd saves in a forward pass: every storage once, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}  # tensors, so that no storage is used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs(head))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def merged(dense: Any, protocol: str, mode: str = "full", rank: int = 8) -> Any:
    merging = {"protocol": protocol, "experts": 4, "top_k": 2, "curvature": {"rank": rank}}
    tuning = {"mode": mode}
    model = upcycle(dense, merging=merging, routing={"segment": SEGMENT}, tuning=tuning).train()
    if mode == "experts":
        freeze(model, mode)
    return model


def planned(dense: Any, model: Any, **precision: Any) -> int:
    found = planned_saved(survey(dense, batch(dense)), expert_layers(model), Precision(**precision), model)
    return round(found.checkpointed() if precision.get("checkpointing") else found.total)


LEAST = {"dense": 0.94, "domain-ca": 0.88, "ep-camex": 0.86, "smoe": 0.8}
DRAWN = [("t5", CLASSIFIER), ("bert", CLASSIFIER), ("gpt2", "causal-lm")]


@pytest.mark.parametrize(
    ("model_type", "head", "protocol", "dropout"),
    [
        *((*case, protocol, 0.0) for case in CASES for protocol in ("dense", "domain-ca")),
        *((*case, protocol, 0.0) for case in DRAWN for protocol in ("ep-camex", "smoe")),
        *((*case, protocol, 0.1) for case in DRAWN for protocol in ("dense", "smoe")),
    ],
)
def test_activations(model_type: str, head: str, protocol: str, dropout: float) -> None:
    """Below by what routing keeps, which is small beside a wider model's own activations than 64 numbers a token."""
    dense = small(model_type, head, dropout=dropout)
    model = merged(dense, protocol)
    assert LEAST[protocol] < planned(dense, model) / saved(model, head) < 1.03


@pytest.mark.parametrize("mode", ["experts", "lora"])
@pytest.mark.parametrize(("model_type", "head"), [*DRAWN, ("llama", "causal-lm")])
def test_frozen_parts_save_less(model_type: str, head: str, mode: str) -> None:
    """Curvature of rank 1: what it makes of the factors of low rank does not grow with tokens, and is not planned."""
    dense = small(model_type, head)
    model = merged(dense, "domain-ca", mode, rank=1)
    full = saved(merged(dense, "domain-ca", rank=1), head)
    found = saved(model, head)
    assert 0.75 < planned(dense, model) / found < 1.1
    if mode == "experts":
        assert found < 0.95 * full


def test_nothing_is_saved_before_the_first_trained_layer() -> None:
    dense = small("gpt2", "causal-lm", layers=3)
    merging = {"protocol": "domain", "experts": 2}
    model = upcycle(dense, merging=merging, upcycle={"layers": [2]}, routing={"segment": SEGMENT}).train()
    freeze(model, "experts")
    found = planned_saved(survey(dense, batch(dense)), expert_layers(model), Precision(), model)
    assert found.blocks["transformer.h.0"] == found.blocks["transformer.h.1"] == 0
    assert found.blocks["transformer.h.2"] > 0


@pytest.mark.parametrize(("model_type", "head"), [("bert", CLASSIFIER), ("gpt2", "causal-lm")])
def test_activations_with_gradient_checkpointing(model_type: str, head: str) -> None:
    """Inputs of all blocks, and everything of one, which is what a model with one block more keeps more."""
    whole = [saved(merged(small(model_type, head, layers=n), "domain-ca"), head) for n in (2, 3)]
    dense = small(model_type, head)
    model = merged(dense, "domain-ca")
    model.activation_checkpointing_enable(CHECKPOINTED)
    most = saved(model, head) + whole[1] - whole[0]
    assert 0.85 < planned(dense, model, checkpointing=True) / most < 1.1


def test_autocast_keeps_less_but_copies_of_the_weights() -> None:
    dense = small("gpt2", "causal-lm")
    with torch.autocast("cpu", torch.bfloat16):
        measured = saved(dense, "causal-lm")
    assert 0.9 < planned(dense, dense, half=True) / measured < 1.1
    assert planned(dense, dense, half=True) < 0.8 * planned(dense, dense)


@pytest.mark.parametrize("protocol", ["dense", "ties-ca", "ep-camex", "fisher"])
@pytest.mark.parametrize("mode", ["full", "experts"])
def test_the_optimizer_to_the_byte(protocol: str, mode: str) -> None:
    dense = small("bert", CLASSIFIER)
    model = merged(dense, protocol)
    if protocol != "dense":
        freeze(model, mode)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = memory(model, survey(dense, batch(dense)), expert_layers(model), Precision())
    state = [t for each in optimizer.state.values() for t in each.values()]
    assert found.optimizer == sum(t.nbytes for t in state)
    assert found.gradients == sum(p.grad.nbytes for p in trained if p.grad is not None)
    assert found.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(("name", "moments"), [("adamw_torch_fused", 2), ("sgd", 0), ("rmsprop", 1)])
def test_other_optimizers_hold_fewer_moments(name: str, moments: int) -> None:
    model = small("bert", CLASSIFIER)
    found = memory(model, survey(model, batch(model)), {}, Precision(optimizer=name))
    tensors = len(list(model.parameters()))
    assert found.optimizer == moments * found.gradients + (4 * tensors if moments else 0)
