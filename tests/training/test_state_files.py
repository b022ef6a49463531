"""States of optimizers, schedules and generators: what is read is what was written, exactly, and no code runs."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from camex_ft.training.state_files import load_state, random_state, save_state, set_random_state

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    made = torch.randint(0, 2**31, shape).to(draw(st.sampled_from(DTYPES)))
    return made.T if made.dim() == 2 and draw(st.booleans()) else made  # also one that is not contiguous


SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(DTYPES)
ARRAYS = st.sampled_from([np.arange(4, dtype=np.uint32), np.zeros((0, 2)), np.float64(0.1), np.int64(3)])
KEYS = st.integers() | st.text() | st.none() | st.tuples(st.integers(), st.text())
STATES = st.recursive(
    SIMPLE | tensors() | ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


def equal(one: Any, other: Any) -> bool:
    """Same values of the same types, bit for bit; NaN equals NaN, 0 is not -0, and dicts keep their order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (np.ndarray, np.generic)):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(other)) or (one, math.copysign(1, one)) == (
            other,
            math.copysign(1, other),
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STATES)
def test_there_and_back(tmp_path: Path, state: Any) -> None:
    save_state(state, tmp_path / "state.safetensors")
    assert equal(load_state(tmp_path / "state.safetensors"), state)


def test_tensors_that_share_their_memory(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    state = [whole, whole[:3], whole.view(2, 3), whole]
    save_state(state, tmp_path / "s.safetensors")
    assert equal(load_state(tmp_path / "s.safetensors"), state)


def test_what_cannot_be_stored_is_named_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\.0\.hook is of type Random"):
        save_state({"state": {0: {"hook": random.Random()}}}, tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_file_that_holds_no_state(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no state"):
        load_state(tmp_path / "model.safetensors")


def test_random_numbers_go_on(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.gauss(0, 1), np.random.normal(), float(torch.randn(()))]

    before = random_state()
    draw()  # the second number of a pair is kept in the state
    save_state(random_state(), tmp_path / "s.safetensors")
    expected = [draw() for _ in range(3)]
    set_random_state(load_state(tmp_path / "s.safetensors"))
    assert [draw() for _ in range(3)] == expected
    set_random_state(before)
