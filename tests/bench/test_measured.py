"""Real training steps beside their plan: parameters exactly, and peak memory to 15 % (slow: a quarter of an hour)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from camex_ft import estimate
from camex_ft.bench import measured
from camex_ft.config import load_config, resolve
from camex_ft.estimate import Where
from tests.helpers.estimate_sizes import MEASURED, WAYS, measured_configuration


@pytest.mark.slow
@pytest.mark.parametrize("family", list(MEASURED))
@pytest.mark.parametrize("way", list(WAYS))
def test_peak_memory_is_within_15_percent(way: str, family: str, tmp_path: Path) -> None:
    given = measured_configuration(family, way, tmp_path)
    settled, _ = resolve(given)
    found = measured.measure(settled)
    where = Where(framework=found.framework, mapped=Where.maps())
    made = estimate.plan(given, protocols=[settled.merging.protocol], where=where, tflops=1.0)
    (own,) = made.columns
    ratio = own.memory.total / found.peak
    print(
        f"{family} {way}: planned {own.memory.total / 1e6:.0f} MB, measured {found.peak / 1e6:.0f}, {ratio:.2f}"
    )
    assert own.parameters == found.parameters
    assert 0.85 < ratio < 1.15


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("glue", ["task.name=stsb", "merging.protocol=dense"]),
        ("glue", ["merging.protocol=ties-ca", "training.gradient_accumulation_steps=2"]),
        ("lm", ["merging.protocol=ep-camex"]),
        ("qa", ["merging.protocol=domain-ca", "tuning.mode=lora"]),
    ],
)
def test_steps_are_taken_on_made_up_rows(name: str, overrides: list[str]) -> None:
    """In this process, which shows that rows of every head train, not how much memory they take."""
    given = load_config(name, ["profile=embedded", "training.per_device_train_batch_size=2", *overrides])
    settled, _ = resolve(given)
    found = measured._measure(settled, 2)
    own = estimate.plan(given, protocols=[settled.merging.protocol], tflops=1.0).own
    assert own is not None
    assert found.parameters == own.parameters
    assert 0 < found.seconds < math.inf
    assert found.steps == 2
    if not torch.cuda.is_available():
        assert found.peak > found.framework > 0
