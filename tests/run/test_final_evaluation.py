"""Runs without an evaluation in training: the final one is the best and the last."""

from __future__ import annotations

from pathlib import Path

import pytest

from camex_ft.results import Record
from camex_ft.results.render import table_of
from camex_ft.run import pipeline
from tests.helpers.task_runs import KINDS, configuration

NEVER = ("training.eval_strategy=no", "training.save_strategy=no", "training.load_best_model_at_end=false")
COPA = ("task.suite=superglue", "task.name=copa")


def run(kind: str, folder: Path, *overrides: str) -> Record:
    return pipeline.run(configuration(kind, f"output.dir={folder}", "output.model=false", *overrides))


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [*((kind, ()) for kind in KINDS), ("classification", COPA)],
    ids=[*KINDS, "superglue"],
)
def test_without_evaluations_in_training_the_final_one_is_best_and_last(
    kind: str, overrides: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(kind, tmp_path, *NEVER, *overrides).metrics
    assert found.per_epoch == []
    assert found.best == found.last == found.all[found.primary] is not None
    assert found.best_epoch and found.best_epoch > 0
    said = capsys.readouterr().out
    assert f"best {found.primary}: {found.best:.4f} (the final evaluation: training had none)" in said
    (row,) = table_of([tmp_path]).panels[0].rows
    assert row.best.mean is not None and row.best.mean == row.last.mean


def test_evaluations_that_never_come_count_as_none(tmp_path: Path) -> None:
    """The best model is to be kept, but the first evaluation would be after the last step."""
    found = run(
        "classification", tmp_path, "training.eval_delay=50", "training.save_strategy=steps",
        "training.save_steps=2", "training.load_best_model_at_end=true",
    ).metrics  # fmt: skip
    assert found.per_epoch == [] and found.best == found.last == found.all["accuracy"]


def test_a_best_model_that_is_kept_has_its_own_evaluation(tmp_path: Path) -> None:
    found = run(
        "classification", tmp_path, "training.save_strategy=steps", "training.save_steps=2",
        "training.load_best_model_at_end=true",
    ).metrics  # fmt: skip
    assert [row["step"] for row in found.per_epoch] == [2]
    assert found.last == found.best == found.per_epoch[0]["validation_accuracy"] == found.all["accuracy"]
