"""Donors as experts: one-hot routing computes what a donor does, uniform routing what their average does."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from camex_ft.backbones import family_of
from camex_ft.upcycling import fixed_routing, upcycle
from camex_ft.utils.registry import PROTOCOLS
from tests.helpers.invariant_cases import FULL, Case, cases, dense, output
from tests.helpers.tiny import inputs_of

TOLERANCE = 1e-5  # of logits of about 1, as of the upcycled model: merged weights are sums that round
DONORS, SEGMENT = 3, 3
# protocols that merge a donor's own weights where routing is one-hot; identity curvature changes nothing
WHOLE = [
    name
    for name in PROTOCOLS.names()
    if (p := PROTOCOLS.get(name)).form == "outputs" or (p.form == "weights" and p.function is None)
]
CASES = [case for case in cases(*FULL) if case.protocol in WHOLE]
ONE_EACH = [case for case in CASES if case.protocol == "smear"]
# one type of a family: the others differ in nothing that the experts are made of
CASES = [case for case in CASES if any(case[:2] == of_all[:2] for of_all in ONE_EACH)]


@cache
def donors(case: Case) -> list[PreTrainedModel]:
    """Return models that differ from the dense one in every parameter, as fine-tuning leaves them."""
    start = dense(case.model_type, case.head)
    made = [copy.deepcopy(start) for _ in range(DONORS)]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for model in made:
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def of_donors(case: Case, models: list[PreTrainedModel], **options: Any) -> PreTrainedModel:
    return upcycle(
        dense(case.model_type, case.head),
        donors=models,
        merging={"protocol": case.protocol, "curvature": {"rank": 2}},
        routing={"granularity": case.granularity, "segment": SEGMENT},
        upcycle=options,
    ).eval()


def with_experts(donor: PreTrainedModel, others: PreTrainedModel) -> PreTrainedModel:
    """Return `others` with the donor's feed-forward layers."""
    model = copy.deepcopy(others)
    theirs = {ffn.path: ffn.weights for ffn in family_of(donor).ffns(donor)}
    with torch.no_grad():
        for ffn in family_of(model).ffns(model):
            for name, (weight, bias) in ffn.weights.items():
                weight.copy_(theirs[ffn.path][name][0])
                if bias is not None:
                    bias.copy_(theirs[ffn.path][name][1])
    return model


def mean(models: list[PreTrainedModel]) -> PreTrainedModel:
    average = copy.deepcopy(models[0])
    with torch.no_grad():
        for name, parameter in average.named_parameters():
            parameter.copy_(torch.stack([dict(m.named_parameters())[name].double() for m in models]).mean(0))
    return average


def assert_same(actual: Tensor, expected: Tensor) -> None:
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * scale)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_hot_routing_computes_what_the_donor_computes(case: Case) -> None:
    models = donors(case)
    model = of_donors(case, models, others="first")
    inputs = inputs_of(dense(case.model_type, case.head), case.head)
    for i, donor in enumerate(models):
        with fixed_routing(model, torch.eye(DONORS)[i]):
            assert_same(output(model, inputs), output(with_experts(donor, models[0]), inputs))
    with fixed_routing(model, torch.eye(DONORS)[0]):
        assert_same(output(model, inputs), output(models[0], inputs))


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in CASES if case.protocol != "smoe"], ids=str)
def test_uniform_routing_computes_what_the_average_computes(case: Case) -> None:
    models = donors(case)
    model = of_donors(case, models, others="average", base="mean")
    inputs = inputs_of(dense(case.model_type, case.head), case.head)
    with fixed_routing(model, torch.full((DONORS,), 1 / DONORS)):
        assert_same(output(model, inputs), output(mean(models), inputs))


@torch.no_grad()
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
@pytest.mark.parametrize("base", ["start", "mean"])
def test_experts_of_enough_rank_compute_what_the_donors_compute(case: Case, base: str) -> None:
    models = donors(case)
    start = dense(case.model_type, case.head)
    model = upcycle(
        start,
        donors=models,
        merging={"protocol": "domain"},
        routing={"granularity": case.granularity, "segment": SEGMENT},
        upcycle={"others": "first", "base": base},
        tuning={"mode": "lora", "lora": {"rank": 16, "scale": 0.5}},
    ).eval()
    inputs = inputs_of(start, case.head)
    for i, donor in enumerate(models):
        with fixed_routing(model, torch.eye(DONORS)[i]):
            assert_same(output(model, inputs), output(with_experts(donor, models[0]), inputs))
