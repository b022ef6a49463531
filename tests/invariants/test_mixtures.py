"""Sparse mixtures as the start: with `smoe` the upcycled model computes what the mixture computes, and back."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from camex_ft.backbones import family_for
from camex_ft.exporting.conversion import mixture_model
from camex_ft.upcycling import expert_layers, load, upcycle
from camex_ft.utils.errors import FunctionChanged, UserError
from tests.helpers.invariant_cases import dense, of_mixture, output, shake
from tests.helpers.tiny import CHOSEN, LAYERS, OWN, VARIANTS, gradients_twice, inputs_of, make, model_types

# float32: the k products of a token are added in another order, of logits of about 1; measured: 1e-7
TOLERANCE = 1e-5
TYPES = model_types(mixtures=True)
VARIED = [pytest.param(t, v, id=f"{t}-{i}") for t in TYPES for i, v in enumerate(VARIANTS[t])]
DENSE_BLOCKS = {"first_k_dense_replace": 1, "mlp_only_layers": 1, "decoder_sparse_step": 2}  # of three


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return output(model, inputs_of(model, "causal-lm"))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * scale)


def smoe(model: PreTrainedModel, **sections: Any) -> PreTrainedModel:
    sections = {"upcycle": {"init": "own-experts"}, **sections}
    return upcycle(model, merging={"protocol": "smoe"}, **sections).eval()


@pytest.mark.parametrize(("model_type", "variant"), VARIED)
def test_a_mixture_of_outputs_computes_what_the_backbone_computes(
    model_type: str, variant: dict[str, Any]
) -> None:
    mixture = make(model_type, "causal-lm", variant)
    before = {name: p.clone() for name, p in mixture.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FunctionChanged)
        model = smoe(mixture)
    layers = expert_layers(model)
    assert len(layers) == LAYERS - sum(DENSE_BLOCKS.get(key, 0) for key in variant)
    assert all((m.settings.experts, m.settings.top_k) == (OWN, CHOSEN) for m in layers.values())
    assert_same(logits(model), logits(mixture))
    for name, value in mixture.state_dict().items():
        assert torch.equal(value, before[name]), f"upcycling changed {name} of the mixture"


@pytest.mark.parametrize("model_type", TYPES)
def test_base_experts_are_means_and_routers_are_those_of_the_blocks(model_type: str) -> None:
    mixture = dense(model_type, "causal-lm")
    model = of_mixture(mixture, "domain")
    for name, layer in expert_layers(model).items():
        block = mixture.get_submodule(name.removesuffix(".experts"))
        assert torch.equal(layer.router.gate, block.gate.weight.t())
        gate, up = block.experts.gate_up_proj.chunk(2, dim=1)
        expected = {"gate": gate, "up": up, "down": block.experts.down_proj}
        for key, linear in layer.linears.items():
            assert torch.equal(linear.experts, expected[key])
            assert torch.equal(linear.base, expected[key].mean(0))


@pytest.mark.parametrize(("model_type", "variant"), VARIED)
def test_the_way_back_computes_what_the_trained_model_computes(
    model_type: str, variant: dict[str, Any], tmp_path: Path
) -> None:
    mixture = make(model_type, "causal-lm", variant)
    model = shake(smoe(mixture))
    back = mixture_model(model)
    assert type(back) is type(mixture) and type(back.config) is type(mixture.config)
    assert_same(logits(back), logits(model))
    back.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(mixture)
    assert torch.equal(logits(loaded), logits(back))


@pytest.mark.parametrize("model_type", TYPES)
def test_the_way_back_of_an_untrained_model_is_the_mixture(model_type: str) -> None:
    mixture = dense(model_type, "causal-lm")
    for protocol in ("smoe", "domain-ca"):
        back = mixture_model(of_mixture(mixture, protocol))
        for name, value in back.state_dict().items():
            # the curvature starts as the identity: products with it round
            torch.testing.assert_close(value, mixture.state_dict()[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_a_checkpoint_of_some_mixtures_loads_bit_for_bit(model_type: str, tmp_path: Path) -> None:
    """Names of experts in checkpoints are those of the hub; a loaded mixture is upcycled and saved all the same."""
    dense(model_type, "causal-lm").save_pretrained(tmp_path / "mixture")
    mixture = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mixture").eval()
    model = shake(smoe(mixture, upcycle={"init": "own-experts", "layers": [1]}))
    model.save_pretrained(tmp_path / "upcycled")
    loaded = load(tmp_path / "upcycled")
    assert list(expert_layers(loaded)) == list(expert_layers(model))
    assert torch.equal(logits(loaded), logits(model))
    assert_same(logits(mixture_model(loaded)), logits(model))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe"])
def test_gradient_checkpointing_and_pickles_change_nothing(model_type: str) -> None:
    model = of_mixture(dense(model_type, "causal-lm"), "domain-ca", segment=3)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))
    plain, checkpointed = gradients_twice(model.train(), inputs_of(model, "causal-lm"))
    assert any("shared_expert" in name for name in plain) == (model_type == "qwen2_moe")
    assert any("router.gate" in name for name in plain) and set(plain) == set(checkpointed)
    for name, gradient in plain.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=TOLERANCE * scale)


def test_merging_weights_changes_the_function_and_says_so() -> None:
    mixture = dense("mixtral", "causal-lm")
    with pytest.warns(FunctionChanged, match="ties-ca merges the weights of experts whose outputs"):
        upcycle(mixture, upcycle={"init": "own-experts"})
    olmoe = dense("olmoe", "causal-lm")
    with pytest.warns(FunctionChanged, match="the backbone's mixtures normalise before the choice"):
        smoe(olmoe, routing={"normalise": "after"})
    with pytest.warns(FunctionChanged, match="a linear router of temperature 1, not cosine"):
        smoe(mixture, routing={"router": "cosine"})


@pytest.mark.parametrize("init", ["copy", "noise", "drop"])
def test_other_starts_of_a_mixture_are_refused(init: str) -> None:
    with pytest.raises(UserError, match=f"init: {init} makes experts of dense layers.*expected own-experts"):
        upcycle(dense("olmoe", "causal-lm"), upcycle={"init": init})


def test_donors_of_a_mixture_are_refused() -> None:
    mixture = dense("olmoe", "causal-lm")
    with pytest.raises(UserError, match="init: checkpoints makes experts of dense layers"):
        upcycle(mixture, donors=[mixture, mixture])


def test_own_experts_of_dense_layers_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"own-experts takes the experts of a sparse mixture.*llama are dense"
    ):
        upcycle(dense("llama", "causal-lm"), upcycle={"init": "own-experts"})


@pytest.mark.parametrize(("key", "own", "other"), [("experts", OWN, 8), ("top_k", CHOSEN, 1)])
def test_other_numbers_than_the_mixtures_are_refused(key: str, own: int, other: int) -> None:
    with pytest.raises(
        UserError, match=f"merging.{key}: got {other}, and the backbone's mixtures have {own}"
    ):
        upcycle(
            dense("mixtral", "causal-lm"),
            merging={"protocol": "smoe", key: other},
            upcycle={"init": "own-experts"},
        )


def test_experts_of_low_rank_are_refused() -> None:
    with pytest.raises(UserError, match=r"tuning\.mode: lora makes experts of low rank"):
        upcycle(
            dense("mixtral", "causal-lm"),
            merging={"protocol": "domain"},
            upcycle={"init": "own-experts"},
            tuning={"mode": "lora"},
        )


def test_unsupported_routing_of_deepseek_is_refused() -> None:
    groups = {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}
    with pytest.raises(UserError, match="group_limited_greedy routes a token to 1 of 2 groups"):
        smoe(make("deepseek_v2", "causal-lm", groups))
    with pytest.raises(UserError, match="DeepSeek-V3 routes by sigmoid scores"):
        family_for("deepseek_v3")
