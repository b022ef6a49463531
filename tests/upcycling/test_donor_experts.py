"""Donors become experts: what is stored of each, what becomes of the other parameters, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

import camex_ft
from camex_ft.backbones import family_of
from camex_ft.exporting.conversion import folded_model
from camex_ft.upcycling import expert_layers, fixed_routing, load, upcycle
from camex_ft.upcycling.plan import KEY
from camex_ft.utils.errors import UserError
from tests.helpers.invariant_cases import dense, output, shake
from tests.helpers.tiny import inputs_of

HEAD = "sequence-classification"


def fine_tuned(seed: int, kind: str = "bert", scale: float = 0.1) -> Any:
    model = copy.deepcopy(dense(kind, HEAD))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def donors() -> list[Any]:
    return [fine_tuned(seed) for seed in (1, 2, 3)]


def others(model: Any) -> dict[str, torch.Tensor]:
    return {
        n: p.detach()
        for n, p in model.named_parameters()
        if ".intermediate." not in n and ".output.dense" not in n
    }


def of(models: list[Any], protocol: str = "domain", **options: Any) -> Any:
    return upcycle(dense("bert", HEAD), donors=models, merging={"protocol": protocol}, upcycle=options)


def test_each_expert_is_a_donors_matrix_and_the_base_is_the_starts(donors: list[Any]) -> None:
    model = of(donors, each=2)
    for ffns in zip(*(family_of(m).ffns(m) for m in (dense("bert", HEAD), *donors)), strict=True):
        layer = expert_layers(model)[ffns[0].path]
        for name, linear in layer.linears.items():
            assert torch.equal(linear.base, ffns[0].weights[name][0])
            for i, ffn in enumerate(ffns[1:]):
                for place in (2 * i, 2 * i + 1):
                    assert torch.equal(linear.experts[place], ffn.weights[name][0])
                    assert torch.equal(linear.expert_bias[place], ffn.weights[name][1])


def test_the_base_may_be_the_mean_or_another_checkpoint(donors: list[Any], tmp_path: Path) -> None:
    donors[2].save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="tokenizer"):  # a backbone's folder has one
        of(donors, base=str(tmp_path / "base"))
    model = of(donors, base="mean")
    for layer in expert_layers(model).values():
        for linear in layer.linears.values():
            torch.testing.assert_close(
                linear.base, linear.experts.mean(0), rtol=0, atol=1e-6
            )  # sums of three


@pytest.mark.parametrize("rule", ["average", "arithmetic", "ties", "first"])
def test_the_other_parameters_follow_their_formula(donors: list[Any], rule: str) -> None:
    model = of(donors, others=rule, others_scale=0.5)
    start, merged = others(dense("bert", HEAD)), others(model)
    assert start.keys() <= merged.keys()
    for name, theta in start.items():
        theirs = torch.stack([others(m)[name] for m in donors]).double()
        tau = theirs - theta
        agrees = tau.sign() == tau.sum(0).sign()
        expected = {
            "average": theirs.mean(0),
            "arithmetic": theta + 0.5 * tau.sum(0),
            "ties": theta + 0.5 * torch.where(agrees, tau, 0).sum(0) / agrees.sum(0).clamp_min(1),
            "first": theirs[0],
        }[rule]
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-6, msg=name)  # float32


@pytest.mark.parametrize(
    "rule", ["average", "arithmetic", "first"]
)  # TIES elects signs, which rounding turns
def test_a_start_of_less_precision_keeps_it(donors: list[Any], rule: str) -> None:
    start = copy.deepcopy(dense("bert", HEAD)).to(torch.bfloat16)
    model = upcycle(start, donors=donors, merging={"protocol": "domain"}, upcycle={"others": rule})
    outside = others(model)
    assert {outside[name].dtype for name in others(start)} == {torch.bfloat16}
    wide = others(of(donors, others=rule))
    for name in others(start):
        # one rounding of the start, of a difference and of the sum, each of 2^-9 of values up to about 2
        torch.testing.assert_close(outside[name].float(), wide[name], rtol=2**-7, atol=2**-7, msg=name)


def test_the_start_and_the_donors_stay_as_they_are(donors: list[Any]) -> None:
    models = [dense("bert", HEAD), *donors]
    before = [copy.deepcopy(m.state_dict()) for m in models]
    of(donors)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_saved_model_names_its_donors_and_needs_none_of_them(donors: list[Any], tmp_path: Path) -> None:
    model = of(donors, "domain-ca").eval()
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    inputs = inputs_of(model, HEAD)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    assert len(getattr(loaded.config, KEY)["donors"]) == 3


def test_experts_of_low_rank_with_donors_are_saved_whole(donors: list[Any], tmp_path: Path) -> None:
    model = upcycle(
        dense("bert", HEAD),
        donors=donors,
        merging={"protocol": "domain"},
        tuning={"mode": "lora", "lora": {"rank": 2}},
    ).eval()
    camex_ft.upcycling.save(model, tmp_path / "model")
    inputs = inputs_of(model, HEAD)
    assert torch.equal(output(load(tmp_path / "model"), inputs), output(model, inputs))


def test_an_adapter_becomes_an_expert_of_its_rank(tmp_path: Path) -> None:
    """The low-rank expert of an adapter computes what the start with the adapter computes."""
    start = dense("bert", HEAD)
    inputs = inputs_of(start, HEAD)
    expected = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        settings = LoraConfig(r=2, lora_alpha=6, target_modules=["intermediate.dense", "output.dense"])
        adapted = get_peft_model(copy.deepcopy(start), settings)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name and "attention" not in name:
                    parameter.normal_(std=0.3)
        adapted.save_pretrained(tmp_path / str(seed))
        expected.append(output(adapted.eval(), inputs).detach())
    model = upcycle(
        start,
        donors=[f"adapter:{tmp_path}/0", f"adapter:{tmp_path}/1"],
        merging={"protocol": "domain"},
        tuning={"mode": "lora", "lora": {"rank": 2, "attention": False}},
    ).eval()
    for i, logits in enumerate(expected):
        with fixed_routing(model, torch.eye(2)[i]):
            # float32 of logits of about 10: the experts come of differences of matrices
            torch.testing.assert_close(output(model, inputs).detach(), logits, rtol=1e-5, atol=1e-4)


def test_compressed_donors_stay_as_they_are_while_routers_are_trained(
    donors: list[Any], tmp_path: Path
) -> None:
    """Fixed low-rank task vectors about a shared part, merged per input: only the router learns."""
    model = upcycle(
        dense("bert", HEAD),
        donors=donors,
        merging={"protocol": "domain-ca", "curvature": {"rank": 1}},
        routing={"init": "fit"},
        upcycle={"rank": 3, "base": "mean"},
    ).eval()
    camex_ft.upcycling.freeze(model, "router")
    assert all(".router." in name for name, p in model.named_parameters() if p.requires_grad)
    for path, layer in expert_layers(model).items():
        for name, linear in layer.linears.items():
            theirs = [ffn for m in donors for ffn in family_of(m).ffns(m) if ffn.path == path]
            tau = torch.stack([ffn.weights[name][0] for ffn in theirs]).double() - linear.base.double()
            left, right = linear.expert_out.double(), linear.expert_in.double()
            # the nearest of rank 3 by Eckart and Young: the error is the rest of the singular values
            rest = torch.linalg.svdvals(tau)[:, 3:].square().sum(1).sqrt()
            torch.testing.assert_close(
                torch.linalg.matrix_norm(tau - left @ right), rest, rtol=1e-5, atol=1e-5
            )
    shake(model, 0.05)
    model.save_pretrained(tmp_path / "model")
    inputs = inputs_of(model, HEAD)
    assert torch.equal(output(load(tmp_path / "model"), inputs), output(model, inputs))
    folded = folded_model(model)
    torch.testing.assert_close(output(folded, inputs), output(model, inputs), rtol=1e-5, atol=1e-5)  # float32
    folded.save_pretrained(tmp_path / "folded")
    assert torch.equal(output(load(tmp_path / "folded"), inputs), output(folded, inputs))


def test_another_number_of_experts_is_refused(donors: list[Any]) -> None:
    with pytest.raises(UserError, match=r"merging.experts: 3 donors give 3 experts, got 4"):
        upcycle(dense("bert", HEAD), donors=donors, merging={"experts": 4})
    with pytest.raises(UserError, match="at least 2 experts"):
        upcycle(dense("bert", HEAD), donors=donors[:1])


def test_a_donor_of_another_start_or_shape_is_refused(donors: list[Any]) -> None:
    unrelated = fine_tuned(5, scale=3.0)
    with pytest.raises(UserError, match="cosine"):
        of([*donors, unrelated])
    config = copy.deepcopy(dense("bert", HEAD).config)
    config.intermediate_size *= 2
    wide = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(UserError, match="tensors are not those of the start"):
        of([*donors, wide])
