"""Dense and folded models: against the model with its routing weights held fast, and against the model itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from camex_ft.exporting.conversion import dense_model, folded_model
from camex_ft.moe.layers.ffn import MixtureFFN
from camex_ft.upcycling import expert_layers, load, save, upcycle
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import PROTOCOLS
from tests.helpers.invariant_cases import Case, dense, output, shake, upcycled
from tests.helpers.tiny import inputs_of

BERT = ("bert", "sequence-classification")
PLACES = [BERT, ("t5", "seq2seq-lm"), ("gpt2", "causal-lm"), ("llama", "causal-lm")]
# what is added in another order, in float32; the tiny models' outputs are about 1
CLOSE = {"rtol": 1e-5, "atol": 3e-6}


def foldable(protocol: str) -> bool:
    """Whether a protocol does anything to domain vectors in evaluation, found by trying it."""
    entry = PROTOCOLS.get(protocol)
    if entry.form in ("dense", "outputs") or not entry.base:
        return False
    tau = torch.tensor([[1.0, -2.0], [3.0, 5.0]])
    function = entry.multiplier
    if function is not None and entry.statistic:
        function = replace(function, statistic=tau.square())
    multiplier = None if function is None else function(tau)
    return entry.curvature or (multiplier is not None and not bool((multiplier == 1).all()))


def some(names: list[str]) -> list[Any]:
    """Protocols, of which the first of each kind is in the default suite: by form, base, curvature and statistic."""
    seen, found = set(), []
    for name in names:
        entry = PROTOCOLS.get(name)
        kind = (entry.form, entry.base, entry.curvature, entry.statistic)
        found.append(pytest.param(name, marks=pytest.mark.slow if kind in seen else []))
        seen.add(kind)
    return found


def made(place: tuple[str, str], protocol: str, **merging: Any) -> PreTrainedModel:
    """A model whose experts differ, with statistics where it has any."""
    model = shake(upcycled(Case(*place, protocol, "auto"), **merging))
    for name, buffer in model.named_buffers():
        if name.endswith("statistic"):
            buffer.copy_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Routing weights for every layer, another mixture in each."""
    draw = torch.Generator().manual_seed(3)
    layers = expert_layers(model)
    return {n: torch.rand(m.settings.experts, generator=draw).softmax(0) for n, m in layers.items()}


@contextmanager
def held(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Route everything with these weights."""
    layers = expert_layers(model)
    for name, layer in layers.items():
        layer.router._weights = lambda logits, mask, s=weights[name]: s.expand_as(logits)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.router._weights


@pytest.mark.parametrize(
    "protocol", some([n for n in PROTOCOLS.names() if PROTOCOLS.get(n).form != "outputs"])
)
@torch.no_grad()
def test_dense_is_the_model_with_its_routing_held_fast(protocol):
    """The export against the layers' own forward pass: one makes E_hat from outside, the other multiplies with it."""
    place = PLACES[len(protocol) % len(PLACES)]
    alpha = 1.0 if PROTOCOLS.get(protocol).form == "dynamic" else 0.7
    model = made(place, protocol, alpha=alpha)
    weights, inputs = weights_of(model), inputs_of(model, place[1])
    found = dense_model(model, weights)
    with held(model, weights):
        expected = output(model, inputs)
    torch.testing.assert_close(output(found, inputs), expected, **CLOSE)
    assert type(found) is type(dense(*place))
    assert not hasattr(found.config, "camex")
    assert found.num_parameters() == dense(*place).num_parameters()


@pytest.mark.parametrize("place", PLACES[:2], ids=lambda place: place[0])
@torch.no_grad()
def test_one_hot_weights_are_that_expert(place):
    """Of a mixture as well: with one expert alone mixing outputs and merging weights are the same."""
    model = made(place, "smoe")
    weights = {n: torch.eye(layer.settings.experts)[1] for n, layer in expert_layers(model).items()}
    inputs = inputs_of(model, place[1])
    with held(model, weights):
        expected = output(model, inputs)
    torch.testing.assert_close(output(dense_model(model, weights), inputs), expected, **CLOSE)


@torch.no_grad()
def test_the_mean_expert_of_a_mixture():
    model = made(BERT, "smoe")
    weights = weights_of(model)
    found = dense_model(model, weights)
    name, layer = next(iter(expert_layers(model).items()))
    assert isinstance(layer, MixtureFFN)
    mean = torch.einsum("n,noi->oi", weights[name].double(), layer.up.experts.double())
    torch.testing.assert_close(found.get_submodule(name).dense.weight, mean.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("protocol", some([n for n in PROTOCOLS.names() if foldable(n)]))
@torch.no_grad()
def test_folded_computes_the_same(protocol):
    """For every input, routed as before: 1e-5 is what is promised."""
    place = PLACES[len(protocol) % len(PLACES)]
    alpha = 1.0 if PROTOCOLS.get(protocol).form == "dynamic" else 0.7
    model = made(place, protocol, alpha=alpha, top_k=2)
    inputs = inputs_of(model, place[1])
    expected, state = output(model, inputs), copy.deepcopy(model.state_dict())
    found = folded_model(model)
    torch.testing.assert_close(output(found, inputs), expected, rtol=1e-5, atol=1e-5)
    assert found.config.camex["merging"]["protocol"] == "smear"
    assert not [n for n in found.state_dict() if "curvature" in n or "statistic" in n or n.endswith(".base")]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()), (
        "it was changed"
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@torch.no_grad()
def test_weights_that_sum_to_less_than_1_keep_base_and_step(alpha):
    model = shake(
        upcycle(
            dense(*BERT),
            merging={
                "protocol": "ties-ca",
                "experts": 3,
                "top_k": 2,
                "alpha": alpha,
                "curvature": {"rank": 1},
            },
            routing={"normalise": "before"},
        )
    ).eval()
    found, inputs = folded_model(model), inputs_of(model, BERT[1])
    torch.testing.assert_close(output(found, inputs), output(model, inputs), rtol=1e-5, atol=1e-5)
    assert found.config.camex["merging"]["protocol"] == "domain"
    assert found.config.camex["merging"]["alpha"] == alpha


@pytest.mark.parametrize("protocol", [n for n in PROTOCOLS.names() if not foldable(n)])
def test_nothing_to_fold(protocol):
    with pytest.raises(UserError, match=f"protocol '{protocol}'.*nothing to fold"):
        folded_model(upcycled(Case(*BERT, protocol, "auto")))


LORA = [
    ("bert", "sequence-classification", "domain-ca", "kronecker"),
    ("t5", "seq2seq-lm", "domain-ca", "low-rank"),
    ("gpt2", "causal-lm", "domain-ca", "diagonal"),  # LoRA on transformers' Conv1D
    ("llama", "causal-lm", "smear", "kronecker"),
    ("bert", "sequence-classification", "dense", "kronecker"),
]


def low_rank(model_type: str, head: str, protocol: str, kind: str) -> PreTrainedModel:
    merging = {"protocol": protocol, "experts": 3, "alpha": 0.7, "curvature": {"rank": 2, "kind": kind}}
    if protocol == "dense":
        merging = {"protocol": protocol}
    tuning = {"mode": "lora", "lora": {"rank": 2, "scale": 0.5}}
    model = upcycle(dense(model_type, head), merging=merging, tuning=tuning, seed=5).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:  # the rest is the backbone
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    "case",
    [*LORA[1:3], *(pytest.param(case, marks=pytest.mark.slow) for case in (LORA[0], *LORA[3:]))],
    ids="-".join,
)
@torch.no_grad()
def test_lora_is_merged_into_the_maps(case):
    model = low_rank(*case)
    weights, inputs = weights_of(model), inputs_of(model, case[1])
    found = dense_model(model, weights)
    with held(model, weights):
        expected = output(model, inputs)
    torch.testing.assert_close(output(found, inputs), expected, **CLOSE)
    assert found.state_dict().keys() == dense(*case[:2]).state_dict().keys()


@pytest.mark.parametrize("case", [*LORA[:2], pytest.param(LORA[2], marks=pytest.mark.slow)], ids="-".join)
@torch.no_grad()
def test_low_rank_experts_are_folded_and_stay_of_low_rank(case, tmp_path: Path):
    """The rank grows with the curvature's terms; LoRA on attention stays what it was; an adapter stays one."""
    model = low_rank(*case)
    found, inputs = folded_model(model), inputs_of(model, case[1])
    torch.testing.assert_close(output(found, inputs), output(model, inputs), rtol=1e-5, atol=1e-5)
    rank = {layer.up.expert_in.shape[1] for layer in expert_layers(found).values()}
    assert rank == {found.config.camex["tuning"]["lora"]["rank"]} == {2 if case[3] == "low-rank" else 4}
    save(found, tmp_path)
    again = load(tmp_path, backbone=dense(*case[:2]))
    assert torch.equal(output(again, inputs), output(found, inputs))


@pytest.mark.parametrize(
    "place", [PLACES[1], pytest.param(PLACES[2], marks=pytest.mark.slow)], ids=lambda place: place[0]
)
@torch.no_grad()
def test_both_are_saved_and_read(place, tmp_path: Path):
    model = made(place, "ties-ca")
    inputs = inputs_of(model, place[1])
    found = dense_model(model, weights_of(model))
    found.save_pretrained(tmp_path / "dense")
    kind = getattr(transformers, type(found).__name__)
    again = kind.from_pretrained(tmp_path / "dense").eval()
    assert torch.equal(output(again, inputs), output(found, inputs))
    folded = folded_model(model)
    save(folded, tmp_path / "folded")
    assert torch.equal(output(load(tmp_path / "folded"), inputs), output(folded, inputs))


@torch.no_grad()
def test_half_precision_stays():
    model = made(PLACES[3], "ties-ca").to(torch.bfloat16)
    assert {p.dtype for p in dense_model(model, weights_of(model)).parameters()} == {torch.bfloat16}
    wide = {
        n.rpartition(".")[0] for n, p in folded_model(model).named_parameters() if p.dtype != torch.bfloat16
    }
    assert all(name.endswith(".router") for name in wide), "routers are of float32 in any case"
