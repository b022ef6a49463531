"""Time of a step: what it is made of, and how it changes with what is trained, the rate and the processes."""

from __future__ import annotations

from typing import Any

import pytest

from camex_ft.estimate.columns import BANDWIDTH, Duration, Setting, duration
from camex_ft.estimate.memory import Engine, Stored, Where
from camex_ft.estimate.operations import measured_tflops, operations
from camex_ft.estimate.survey import Precision, survey
from camex_ft.upcycling import expert_layers, freeze, upcycle
from tests.helpers.estimate_sizes import CLASSIFIER, batch, small

ONE = Engine()


def of(
    model: Any, *, steps: int = 1, engine: Engine = ONE, tflops: float = 1.0, **precision: Any
) -> Duration:
    found = survey(small("bert", CLASSIFIER), batch(model, steps=steps))
    setting = Setting(precision=Precision(**precision), where=Where(engine=engine), tflops=tflops)
    return duration(model, operations(found, expert_layers(model)), found.batch, setting)


def test_a_dense_step_by_hand() -> None:
    """6 operations a multiply-add: as a trained matrix, an attention's products have two gradients each."""
    dense = small("bert", CLASSIFIER)
    found = survey(dense, batch(dense))
    expected = 6 * operations(found, {}).total * found.batch.tokens / 1e12
    assert of(dense).computing == pytest.approx(expected, rel=1e-12)
    assert of(dense, tflops=4.0).computing == pytest.approx(expected / 4, rel=1e-12)
    assert of(dense, steps=3).computing == pytest.approx(3 * expected, rel=1e-12)
    assert of(dense, checkpointing=True).computing == pytest.approx(4 / 3 * expected, rel=1e-12)
    assert of(dense).sending == 0


def test_frozen_parts_take_less_and_merging_more() -> None:
    dense = small("bert", CLASSIFIER)
    merged = upcycle(dense, merging={"protocol": "domain-ca", "experts": 4})
    trained = of(merged).computing
    assert trained > of(dense).computing
    freeze(merged, "experts")
    assert of(merged).computing < trained
    tuning = {"mode": "lora", "lora": {"rank": 1}}
    thin = upcycle(dense, merging={"protocol": "domain", "experts": 4}, tuning=tuning)
    assert of(thin).computing < of(dense).computing


def test_what_is_sent() -> None:
    dense = small("bert", CLASSIFIER)
    size = sum(Stored.of(dense).gradients.values())
    for name, times in (("ddp", 2), ("zero2", 2), ("fsdp", 3), ("zero3", 3)):
        found = of(dense, engine=Engine(name=name, processes=4))
        assert found.sending == pytest.approx(times * size * 3 / 4 / BANDWIDTH, rel=1e-12)
        assert found.total == found.computing + found.sending


def test_the_rate_of_this_machine() -> None:
    assert 1e-4 < measured_tflops() < 1e3
