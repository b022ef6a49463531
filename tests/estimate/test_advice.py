"""Advice: what fits is what the plan of the changed configuration says, and no change is made in vain."""

from __future__ import annotations

from typing import Any

import pytest

from camex_ft.config import Config, load_config, resolve
from camex_ft.config.rules import broken
from camex_ft.estimate import Where, plan
from camex_ft.estimate.advice import Advice, advise, halves
from camex_ft.estimate.memory import Engine

GIVEN = ["profile=embedded", "training.per_device_train_batch_size=8", "merging.experts=4"]


def advice(*overrides: str, limit: int = 1, gpu: bool = False, where: Where | None = None) -> Advice:
    given = load_config("glue", [*GIVEN, *overrides])
    own = [given.merging.protocol]  # a plan's other columns are not advised on
    made = plan(given, gpu=gpu, limit=limit, where=where, protocols=own, tflops=1.0)
    assert made.advice is not None
    return made.advice


def keys(found: Advice) -> set[str]:
    return {setting.partition("=")[0] for way in found.alone for setting in way.settings}


@pytest.mark.parametrize("protocol", ["domain-ca", "dense"])
def test_what_is_advised_is_true(protocol: str) -> None:
    """Planned again from the settings as they are shown, it takes what was said."""
    found = advice(f"merging.protocol={protocol}")
    assert found.alone
    assert found.together is None  # nothing fits a byte
    for way in found.alone:
        given = load_config("glue", [*GIVEN, f"merging.protocol={protocol}", *way.settings])
        own = plan(given, gpu=False, protocols=[protocol], tflops=1.0).own
        assert own is not None
        assert own.memory.total == way.peak, way


def test_together_is_as_little_as_is_needed() -> None:
    alone = advice("merging.protocol=domain-ca")
    limit = min(way.peak for way in alone.alone) - 1  # none fits by itself
    found = advice("merging.protocol=domain-ca", limit=limit).together
    assert found is not None
    assert found.peak <= limit
    own = plan(
        load_config("glue", [*GIVEN, "merging.protocol=domain-ca", *found.settings]),
        gpu=False,
        protocols=["domain-ca"],
        tflops=1.0,
    ).own
    assert own is not None
    assert own.memory.total == found.peak


def test_what_is_not_possible_is_not_advised() -> None:
    dense = keys(advice("merging.protocol=dense"))
    assert "merging.experts" not in dense
    assert "tuning.mode" in dense  # lora, but not experts
    assert {"training.bf16", "training.use_cpu"} <= dense
    ties = advice("merging.protocol=ties-ca")
    assert ("tuning.mode=lora",) not in [way.settings for way in ties.alone]
    on_gpus = advice(gpu=True, where=Where(engine=Engine(processes=2)))
    assert ("--engine fsdp",) in [way.settings for way in on_gpus.alone]
    assert "training.use_cpu" not in keys(on_gpus)
    set_already = ["training.bf16=true", "training.use_cpu=true", "training.activation_checkpointing=true"]
    assert not {"training.bf16", "training.activation_checkpointing"} & keys(advice(*set_already))


def test_changes_keep_the_batch_and_the_rules() -> None:
    settled, _ = resolve(load_config("glue", [*GIVEN, "training.gradient_accumulation_steps=3"]))
    batches: list[int] = []

    def peak(changed: Config, where: Where) -> int:
        assert not list(broken(changed))
        extra: dict[str, Any] = changed.training.model_extra or {}
        batches.append(changed.training.per_device_train_batch_size * extra["gradient_accumulation_steps"])
        return 10

    advise(settled, Where(), 1, peak, gpu=False)
    assert set(batches) == {24}


def test_halves() -> None:
    assert list(halves(12)) == [6, 3]
    assert list(halves(1)) == []
