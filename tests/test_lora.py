"""`tuning.mode: lora` on whole models: the function at the start, what is trained, protocols, generation."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.tuners.lora import LoraLayer

from camex_ft.analysis.inspection import domain_vectors
from camex_ft.config import config_hash, load_config
from camex_ft.moe.layers.low_rank_expert_linear import LowRankLinear
from camex_ft.training.cost import count_parameters
from camex_ft.upcycling import expert_layers, freeze, upcycle
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import PROTOCOLS
from tests.helpers.invariant_cases import dense, output
from tests.helpers.lora_models import ABLE, CLASSIFIER, FAMILIES, FIRST, HEADS, LORA, SOME, lora, train
from tests.helpers.tiny import VOCABULARY, gradients_twice, inputs_of, make

# -- what is made


@pytest.mark.parametrize(
    ("model_type", "protocol"),
    [(t, p) for types in FAMILIES.values() for t in types for p in (ABLE if t == "bert" else SOME[1:])],
)
def test_the_function_is_preserved(model_type: str, protocol: str) -> None:
    original = dense(model_type, CLASSIFIER)
    inputs = inputs_of(original, CLASSIFIER)
    made = lora(model_type, protocol=protocol)
    expected = output(original, inputs)
    # float32: one more sum of products that are 0, in kernels of other shapes
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(output(made, inputs), expected, rtol=0, atol=1e-5 * scale)
    found = {type(m) for m in made.modules() if isinstance(m, (LowRankLinear, LoraLayer))}
    assert len(found) == 1 if protocol == "dense" else len(found) >= 2, "no LoRA beside the experts"


@pytest.mark.parametrize("model_type", FIRST)
@pytest.mark.parametrize("protocol", ["domain-ca", "dense"])
def test_what_is_trained(model_type: str, protocol: str) -> None:
    made = lora(model_type, protocol=protocol)
    trained = {n for n, p in made.named_parameters() if p.requires_grad}
    layers, head = tuple(expert_layers(made)), made.base_model_prefix
    outside = {n for n, _ in made.named_parameters() if not n.startswith(f"{head}.")}
    inside = {
        n
        for n, _ in made.named_parameters()
        if (n.startswith(layers) and not n.endswith((".base", ".base_bias"))) or ".lora_" in n
    }
    assert trained == outside | inside and outside and (layers or protocol == "dense")
    assert {n.rpartition(".")[2] for n in inside} >= ({"expert_in", "expert_out"} if layers else {"weight"})
    made.train()
    made(**inputs_of(made, CLASSIFIER)).logits.square().sum().backward()
    assert all((p.grad is not None) == (n in trained) for n, p in made.named_parameters() if "noise" not in n)


@pytest.mark.parametrize(("model_type", "head"), HEADS.items())
def test_a_language_modelling_head_stays_frozen(model_type: str, head: str) -> None:
    given = make(model_type, head, {"tie_word_embeddings": False})
    made = upcycle(given, merging={"protocol": "domain", "experts": 2}, tuning=LORA)
    assert not made.get_output_embeddings().weight.requires_grad


def test_without_attention_the_experts_alone() -> None:
    plain = lora(tuning={"mode": "lora", "lora": {"attention": False}})
    assert not any(isinstance(m, LoraLayer) for m in plain.modules())
    baseline = lora(protocol="dense", tuning={"mode": "lora", "lora": {"attention": False}})
    found = [n for n, m in baseline.named_modules() if isinstance(m, LoraLayer)]
    assert len(found) == 6 and all(n.endswith(("intermediate.dense", "output.dense")) for n in found)


def test_maps_of_attention_by_name() -> None:
    made = lora(tuning={"mode": "lora", "lora": {"targets": ["query", "key"], "scale": 3.0, "rank": 4}})
    found = {n.rpartition(".")[2]: m for n, m in made.named_modules() if isinstance(m, LoraLayer)}
    assert set(found) == {"query", "key"}
    assert found["key"].scaling == {"default": 3.0} and found["key"].r == {"default": 4}
    with pytest.raises(UserError, match=r"no linear map 'querry'.*Did you mean 'query'"):
        lora(tuning={"mode": "lora", "lora": {"targets": ["querry"]}})


@pytest.mark.parametrize("protocol", [name for name in PROTOCOLS.names() if name not in ABLE])
def test_protocols_that_cannot_be_of_low_rank(protocol: str) -> None:
    """Refused where a configuration is read, and where a model is made, before it is copied."""
    said = "propagates the base" if PROTOCOLS.get(protocol).form == "dynamic" else "weighs every entry"
    with pytest.raises(UserError, match=rf"tuning.mode: protocol '{protocol}' {said}.*domain-ca"):
        lora(protocol=protocol)
    overrides = ["profile=embedded", f"merging.protocol={protocol}", "tuning.mode=lora"]
    with pytest.raises(UserError, match=rf"tuning.mode: protocol '{protocol}' {said}"):
        load_config("glue", overrides)


def test_which_protocols_can() -> None:
    assert {"dense", "domain", "domain-ca", "smear", "smoe"} <= set(ABLE)
    assert not {"ties", "dare-ca", "fisher", "ep-camex", "namex"} & set(ABLE)


@pytest.mark.filterwarnings("ignore::camex_ft.utils.errors.FunctionChanged")
def test_dropped_units_are_not_of_low_rank() -> None:
    with pytest.raises(UserError, match=r"upcycle.init: drop draws whole units anew.*expected copy or noise"):
        lora(upcycle={"init": "drop"})
    with pytest.raises(UserError, match=r"upcycle.init: drop draws"):
        load_config(
            "glue",
            ["profile=embedded", "merging.protocol=domain", "tuning.mode=lora", "upcycle.init=drop"],
        )


def test_noise_sets_low_rank_experts_apart() -> None:
    for layer in expert_layers(lora(upcycle={"init": "noise", "noise": 0.1})).values():
        for linear in layer.linears.values():
            assert linear.expert_out.abs().amin() > 0 and linear.base.equal(linear.base)


def test_lora_needs_a_model_that_was_made_for_it() -> None:
    made = upcycle(dense("bert", CLASSIFIER), merging={"protocol": "domain", "experts": 2})
    with pytest.raises(UserError, match=r"tuning.mode: lora needs a model that was made for it.*upcycle"):
        freeze(made, "lora")


@pytest.mark.parametrize("model_type", FIRST)
def test_trained_parameters_are_float32_on_half_weights(model_type: str) -> None:
    given = copy.deepcopy(dense(model_type, CLASSIFIER)).to(torch.bfloat16)
    made = upcycle(given, merging={"protocol": "domain-ca", "experts": 2}, tuning=LORA).train()
    dtypes = {p.requires_grad: p.dtype for p in made.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    made(**inputs_of(made, CLASSIFIER)).logits.float().square().sum().backward()
    grads = [p.grad for n, p in made.named_parameters() if p.requires_grad and "noise" not in n]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_parameters_counted_by_hand() -> None:
    """BERT of 3 layers, 8 wide and 12 inside: maps 12 x 8 and 8 x 12, 3 experts of rank 2, curvature of rank 2."""
    made = lora()
    counted = count_parameters(made)
    factors, biases, base = 3 * 2 * 2 * (12 + 8), 3 * (12 + 8), 2 * 12 * 8 + 12 + 8
    curvature = 2 * 3 * ((9 + 16 + 4 + 16) + (9 + 16) + (4 + 16 + 9 + 16) + (4 + 16))
    router, head, attention = 2 * 8 * 3, 8 * 2 + 2, 3 * 2 * 2 * (8 + 8)
    assert (counted.experts, counted.base) == (3 * (factors + biases), 3 * base)
    assert (counted.curvature, counted.routers) == (3 * curvature, 3 * router)
    assert counted.trainable == 3 * (factors + biases + curvature + router) + head + attention
    assert counted.total == sum(p.numel() for p in made.parameters())
    # a token meets the base's maps, one merged bias and all factors
    left = counted.total - counted.experts - counted.base - counted.curvature
    assert counted.active == left + 3 * (2 * 12 * 8 + 12 + 8 + factors)


# -- what is done with it


@pytest.mark.parametrize("model_type", ["bert", "llama", "t5"])
def test_gradient_checkpointing_changes_no_gradient(model_type: str) -> None:
    made = train(lora(model_type, tuning={"mode": "lora", "lora": {"rank": 2, "dropout": 0.2}})).train()
    plain, again = gradients_twice(made, inputs_of(made, CLASSIFIER))
    assert plain.keys() == again.keys() and plain
    assert [n for n, grad in plain.items() if not torch.equal(grad, again[n])] == []


@pytest.mark.parametrize(
    ("model_type", "head", "protocol"),
    [*((t, h, "domain-ca") for t, h in HEADS.items()), ("gpt2", "causal-lm", "smoe")],
)
def test_generation_with_a_cache_is_that_without(model_type: str, head: str, protocol: str) -> None:
    made = train(lora(model_type, head, protocol)).double()
    made.generation_config.eos_token_id = None
    ids = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
    found = [
        made.generate(
            ids,
            max_new_tokens=8,
            num_beams=2,
            use_cache=cache,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for cache in (True, False)
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    # float64: the same sums in another order
    torch.testing.assert_close(found[0].sequences_scores, found[1].sequences_scores, rtol=1e-9, atol=1e-9)


def test_a_copy_is_a_model_of_its_own() -> None:
    made = train(lora())
    inputs = inputs_of(made, CLASSIFIER)
    before = output(made, inputs)
    twin = copy.deepcopy(made)
    assert torch.equal(output(twin, inputs), before)
    train(twin)
    assert torch.equal(output(made, inputs), before) and not torch.equal(output(twin, inputs), before)


def test_domain_vectors_are_inspected_without_making_them() -> None:
    layer = next(iter(expert_layers(train(lora())).values()))
    parts = [
        torch.cat([m.vectors().flatten(1), m.expert_bias - m.base_bias], 1) for m in layer.linears.values()
    ]
    tau = torch.cat(parts, 1).double()
    found = domain_vectors(layer)
    torch.testing.assert_close(torch.as_tensor(found.length), tau.norm(dim=1), rtol=1e-6, atol=0)
    cosine = torch.nn.functional.cosine_similarity(tau[:, None], tau[None], dim=2)
    torch.testing.assert_close(torch.as_tensor(found.cosine), cosine, rtol=0, atol=1e-6)


# -- experts alone, whole ones


@pytest.mark.parametrize(
    ("model_type", "protocol"),
    [("bert", n) for n in PROTOCOLS.names() if PROTOCOLS.get(n).curvature]
    + [(t, n) for t in FIRST if t != "bert" for n in ("domain-ca", "ep-camex")],
)
def test_experts_mode_trains_experts_curvature_router_and_head(model_type: str, protocol: str) -> None:
    made = upcycle(dense(model_type, CLASSIFIER), merging={"protocol": protocol, "experts": 3}).train()
    freeze(made, "experts")
    layers = tuple(expert_layers(made))
    made(**inputs_of(made, CLASSIFIER)).logits.square().sum().backward()
    for name, parameter in made.named_parameters():
        trained = name.startswith(layers) or not name.startswith(f"{made.base_model_prefix}.")
        assert parameter.requires_grad is trained, name
        if not trained:
            assert parameter.grad is None, name
    curved = [p for n, p in made.named_parameters() if ".curvature.a1" in n]
    assert curved and all(p.grad is not None and p.grad.isfinite().all() for p in curved)


def test_a_lora_run_has_another_hash_and_others_keep_theirs() -> None:
    def hashed(*overrides: str) -> str:
        return config_hash(load_config("glue", ["profile=embedded", "merging.protocol=domain", *overrides]))

    assert hashed() == hashed("tuning.lora.rank=3")  # without effect in another mode
    assert len({hashed("tuning.mode=lora"), hashed("tuning.mode=lora", "tuning.lora.rank=3"), hashed()}) == 3
