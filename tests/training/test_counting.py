"""Rows and tokens of a training are counted, whatever its batches: speed, rows of a step, the closing log line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import TrainerCallback

from camex_ft.training.trainer import CamexTrainer
from tests.helpers.training_runs import BATCH, TRAIN, rows, trainer

BRIEF: dict[str, Any] = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "num_train_epochs": 1,
}
UNEVEN = TRAIN + 2  # the last batch is a short one


def trained(folder: Path, **settings: Any) -> tuple[CamexTrainer, dict[str, float]]:
    run = trainer(folder, train_rows=UNEVEN, **{**BRIEF, **settings})
    return run, run.train().metrics


CASES = [
    pytest.param({}, UNEVEN, BATCH, id="a short last batch"),
    pytest.param(
        {"gradient_accumulation_steps": 50}, UNEVEN, UNEVEN, id="more micro-batches than an epoch has"
    ),
    pytest.param({"gradient_accumulation_steps": 2}, UNEVEN, 2 * BATCH, id="a short last step"),
    pytest.param({"dataloader_drop_last": True}, TRAIN, BATCH, id="the last batch dropped"),
    pytest.param({"max_steps": 2}, 2 * BATCH, BATCH, id="part of an epoch"),
    pytest.param({"max_steps": 7}, UNEVEN + 2 * BATCH, BATCH, id="more than an epoch"),
    pytest.param({"num_train_epochs": 1.5}, UNEVEN + 3 * BATCH, BATCH, id="a fraction of an epoch"),
    pytest.param({"num_train_epochs": 1e-9}, BATCH, BATCH, id="a single step"),
    pytest.param({"train_sampling_strategy": "batch_rebalance"}, UNEVEN, None, id="rebalanced batches"),
]


@pytest.mark.parametrize(("settings", "count", "largest"), CASES)
def test_rows_are_those_that_were_trained_on(
    settings: dict[str, Any], count: int, largest: int | None, tmp_path: Path
) -> None:
    run, metrics = trained(tmp_path, **settings)
    assert run.progress.rows == count
    assert largest is None or run.rows_a_step() == largest
    found = run.speed(metrics)
    assert found is not None
    assert found.samples * metrics["train_runtime"] == pytest.approx(count)
    line = run.state.log_history[-1]
    # transformers rounds the time to four digits after the point, and the rows a second to three
    assert line["train_samples_per_second"] == pytest.approx(count / metrics["train_runtime"], rel=1e-3)


def test_tokens_are_those_of_these_rows(tmp_path: Path) -> None:
    run, _ = trained(tmp_path, gradient_accumulation_steps=50)
    assert int(run.progress.tokens) == int(
        np.sum([np.sum(mask) for mask in rows(UNEVEN, 1)["attention_mask"]])
    )


class Stop(TrainerCallback):
    """Ends a run at a step, as a signal would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= 3


def test_a_run_that_goes_on_counts_its_own_part_and_knows_the_largest_step(tmp_path: Path) -> None:
    settings = {**BRIEF, "max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    first = trainer(tmp_path, train_rows=UNEVEN, callbacks=[Stop()], **settings)
    first.train()
    assert first.progress.rows == 3 * BATCH
    run = trainer(tmp_path, train_rows=UNEVEN, **settings)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 5
    assert run.progress.rows == UNEVEN - 3 * BATCH and run.rows_a_step() == BATCH


def test_each_training_of_a_trainer_is_counted_by_itself(tmp_path: Path) -> None:
    run, _ = trained(tmp_path)
    run.evaluate()
    assert run.progress.evaluating > 0
    run.train()
    assert run.progress.rows == UNEVEN and run.progress.evaluating == 0
