"""Tests here run for every registered family, variant and head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers.tiny import VARIANTS, heads_of, inputs_of, make, model_types


def _case(*values: Any) -> Any:
    *names, variant = values
    return pytest.param(*values, id="-".join([*names, *(f"{key}={value}" for key, value in variant.items())]))


VARIED = [_case(t, variant) for t in model_types() for variant in VARIANTS.get(t, [{}])]
CASES = [
    _case(t, head, variant)
    for t in model_types()
    for head in heads_of(t)
    for variant in (VARIANTS.get(t, [{}]) if head == "sequence-classification" else [{}])
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise by the arguments' names: every type of model with every head, with every variant, or alone."""
    names = set(metafunc.fixturenames)
    if {"model_type", "head", "variant"} <= names:
        metafunc.parametrize("model_type, head, variant", CASES)
    elif {"model_type", "variant"} <= names:
        metafunc.parametrize("model_type, variant", VARIED)
    elif "model_type" in names:
        metafunc.parametrize("model_type", model_types())


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """`tiny(model_type, head="base", **variant)` -> a model in evaluation mode with random weights, biases too."""
    return lambda model_type, head="base", **variant: make(model_type, head, variant)


@pytest.fixture(scope="session")
def inputs() -> Callable[..., dict[str, torch.Tensor]]:
    """`inputs(model, head)` -> arguments of its forward pass."""
    return inputs_of
