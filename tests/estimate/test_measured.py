"""Peak memory of a process, and real training steps beside their plan: parameters exactly, memory to 15 % (slow)."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from camex_ft import estimate
from camex_ft.config import load_config, resolve
from camex_ft.estimate import Where, measured
from camex_ft.utils.errors import UserError
from tests.helpers.estimate_sizes import MEASURED, WAYS, measured_configuration

MB = 10**6


@pytest.fixture
def resettable():
    """Skip where a peak can only be bounded."""
    if not measured.reset_peak():
        pytest.skip("this system cannot set a process's peak memory back")


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("resettable")
def test_peak_memory_is_what_a_function_holds_beyond_what_was_there():
    for _ in range(2):  # the first peak does not hide the second
        extra = measured.extra_memory(lambda: torch.ones(16 * MB), device="cpu")
        assert extra == pytest.approx(64 * MB, rel=0.05)


@pytest.mark.usefixtures("resettable")
def test_a_higher_peak_before_does_not_count():
    torch.ones(64 * MB)
    assert measured.extra_memory(lambda: None, device="cpu") < 2 * MB
    pieces = [
        torch.ones(25_000) for _ in range(500)
    ]  # 50 MB of a size that the C library keeps when it is freed
    del pieces
    extra = measured.extra_memory(lambda: [torch.ones(25_000) for _ in range(200)], device="cpu")
    assert extra == pytest.approx(20 * MB, rel=0.2)


def test_the_process_holds_at_most_its_peak_and_the_machine_at_least_that():
    assert (
        MB
        < measured.resident()
        <= measured.peak_resident()
        < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )


# -- a process of its own ---------------------------------------------------------------------------------------------


def test_a_child_is_another_process_with_the_result_and_the_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        process, threads = measured.in_child(
            eval, "__import__('os').getpid(), __import__('torch').get_num_threads()"
        )
    finally:
        torch.set_num_threads(before)
    assert process != os.getpid()
    assert threads == before + 1


def test_a_child_that_was_ended_is_told_of_as_a_lack_of_memory():
    with pytest.raises(UserError, match=r"was killed, as happens when the machine runs out.*--skip-plain"):
        measured.in_child(os._exit, 9)


def test_a_child_that_asks_for_too_much_memory_is_told_of():
    with pytest.raises(UserError, match=r"not enough memory: .*--skip-plain"):
        measured.in_child(torch.empty, 2**50)


# -- training steps ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", list(MEASURED))
@pytest.mark.parametrize("way", list(WAYS))
def test_peak_memory_is_within_15_percent(way: str, family: str, tmp_path: Path) -> None:
    given = measured_configuration(family, way, tmp_path)
    settled, _ = resolve(given)
    found = measured.measure(settled)
    where = Where(framework=found.framework)
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
