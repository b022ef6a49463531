"""The history of a run: lines as they are logged, one entry an evaluation, best and last."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from camex_ft.training.callbacks.reporting import (
    HistoryCallback,
    Outcome,
    best_and_last,
    epochs,
    only_metrics,
)

LOG: list[dict[str, Any]] = [
    {"loss": 0.7, "learning_rate": 1e-3, "epoch": 0.5, "step": 2},
    {"eval_a_accuracy": 0.5, "eval_a_loss": 0.6, "eval_a_runtime": 1.0, "epoch": 1.0, "step": 4},
    {"eval_b_accuracy": 0.25, "eval_b_samples_per_second": 9.0, "epoch": 1.0, "step": 4},
    {"loss": 0.6, "epoch": 1.5, "step": 6},
    {"eval_a_accuracy": 0.75, "eval_a_steps_per_second": 3.0, "epoch": 2.0, "step": 8},
    {"train_runtime": 3.0, "epoch": 2.0, "step": 8},
]


def test_evaluations_of_one_step_are_one_entry() -> None:
    assert epochs(LOG) == [
        {"step": 4, "epoch": 1.0, "a_accuracy": 0.5, "a_loss": 0.6, "b_accuracy": 0.25},
        {"step": 8, "epoch": 2.0, "a_accuracy": 0.75},
    ]
    assert epochs([]) == []


def test_only_metrics_leaves_timings_and_other_entries_out() -> None:
    entry = {"eval_f1": 0.5, "eval_runtime": 2.0, "eval_model_preparation_time": 0.1, "epoch": 1.0}
    assert only_metrics(entry) == {"f1": 0.5}
    assert only_metrics({"final_x_f1": 0.5, "eval_f1": 0.1}, prefix="final_") == {"x_f1": 0.5}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5, 0.9, 0.7], Outcome(0.9, 2.0, 0.7)),
        ([0.9, 0.9], Outcome(0.9, 1.0, 0.9)),  # the first of equals, as the Trainer keeps it
        ([-0.5, -0.1], Outcome(-0.1, 2.0, -0.1)),
        ([math.nan, 0.2], Outcome(0.2, 2.0, 0.2)),
        ([None, None], Outcome(None, None, None)),
        ([], Outcome(None, None, None)),
    ],
)
def test_best_and_last(values: list[Any], expected: Outcome) -> None:
    rows = [
        {"step": i, "epoch": float(i), **({} if v is None else {"f1": v})} for i, v in enumerate(values, 1)
    ]
    assert best_and_last(rows, "f1") == expected


def test_the_best_is_the_least_where_less_is_better() -> None:
    rows = [{"step": i, "epoch": float(i), "ppl": v} for i, v in enumerate([9.0, 3.0, 3.0, math.inf], 1)]
    assert best_and_last(rows, "ppl", greater_is_better=False) == Outcome(3.0, 2.0, math.inf)


@pytest.mark.parametrize("main", [True, False])
def test_lines_are_written_in_the_main_process(main: bool) -> None:
    lines: list[dict[str, Any]] = []
    state = TrainerState(global_step=3, epoch=0.5, is_world_process_zero=main)
    callback = HistoryCallback(lines.append)
    callback.on_log(None, state, TrainerControl(), logs={"loss": 0.5})  # type: ignore[arg-type]
    callback.on_log(None, state, TrainerControl())  # type: ignore[arg-type]
    assert lines == ([{"step": 3, "epoch": 0.5, "loss": 0.5}, {"step": 3, "epoch": 0.5}] if main else [])
