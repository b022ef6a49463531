"""Invariant 8, second half: train, stop at any step, go on: the same weights and log, bit for bit, as never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

from camex_ft.training import signals
from camex_ft.training.checkpoint_folder import checkpoints, choose, ended, is_extra, state_of
from camex_ft.training.trainer import CamexTrainer
from tests.helpers.training_runs import STEPS_AN_EPOCH, Stop, StopAfter, model, same, trainer, weights

EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch"}
STEPS = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 3, "save_steps": 3}
APART = {"eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 2, "logging_steps": 3.0}
TIMES = ("runtime", "per_second", "preparation_time")


class Ask(TrainerCallback):
    """Asks to end, as a signal does, while a step is under way or in the evaluation that belongs to it."""

    def __init__(self, step: int, *, in_evaluation: bool = False) -> None:
        self.step, self.in_evaluation = step, in_evaluation

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1 and not self.in_evaluation:
            assert signals.note(15)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.in_evaluation:
            signals.note(15)


def run(folder: Path, protocol: str, settings: dict[str, Any], *callbacks: TrainerCallback) -> CamexTrainer:
    made = trainer(
        folder,
        model(protocol),
        callbacks=callbacks,
        **{"load_best_model_at_end": False, "save_total_limit": 2, **settings},
    )
    checkpoint, notes = choose("auto", folder)
    assert notes == []
    if checkpoint is not None and ended(state_of(checkpoint)):
        made.finish(checkpoint)
    else:
        made.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return made


def assert_same(resumed: CamexTrainer, whole: CamexTrainer) -> None:
    assert same(weights(resumed), weights(whole)) == []
    assert history(resumed) == history(whole)
    assert resumed.state.best_metric == whole.state.best_metric
    assert resumed.state.total_flos == whole.state.total_flos


@pytest.mark.parametrize(
    ("protocol", "settings", "stop", "saved"),
    [
        ("ties-ca", EPOCHS, STEPS_AN_EPOCH, STEPS_AN_EPOCH),
        ("dare-ca", STEPS, 5, 3),  # in the middle of an epoch, and a step after what was saved
        ("smoe", {**STEPS, "train_sampling_strategy": "random", "gradient_accumulation_steps": 2}, 3, 3),
        ("fisher", {**STEPS, "gradient_accumulation_steps": 2}, 3, 3),
        ("namex-full", {**STEPS, "optim": "adafactor"}, 4, 3),
        ("domain", {**EPOCHS, "train_sampling_strategy": "random"}, STEPS_AN_EPOCH + 2, STEPS_AN_EPOCH),
        # an evaluation after the checkpoint of its step: a run that goes on must not leave it out
        ("domain", APART, STEPS_AN_EPOCH, STEPS_AN_EPOCH),
    ],
)
def test_a_resumed_run_has_the_weights_of_one_never_stopped(
    protocol: str, settings: dict[str, Any], stop: int, saved: int, tmp_path: Path
) -> None:
    whole = run(tmp_path / "whole", protocol, settings)
    with pytest.raises(Stop):
        run(tmp_path / "stopped", protocol, settings, StopAfter(stop))
    checkpoint, _ = choose("auto", tmp_path / "stopped")
    assert checkpoint.name == f"checkpoint-{saved}"
    assert_same(run(tmp_path / "stopped", protocol, settings), whole)


@pytest.mark.parametrize(
    ("settings", "every", "in_evaluation"),
    [
        ({**APART, "gradient_accumulation_steps": 2, "num_train_epochs": 3.0}, 2, False),
        pytest.param(
            {**STEPS, "load_best_model_at_end": True, "eval_steps": 1, "logging_steps": 4.0},
            3,
            True,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_is_asked_to_stop_goes_on_from_the_very_step(
    settings: dict[str, Any], every: int, in_evaluation: bool, tmp_path: Path
) -> None:
    """At every step in turn of the same run."""
    whole = run(tmp_path / "whole", "ties-ca", settings)
    steps = whole.state.max_steps
    for step in range(1, steps + 1):
        with pytest.raises(signals.Stopped) as stopped:
            run(tmp_path / "stopped", "ties-ca", settings, Ask(step, in_evaluation=in_evaluation))
        assert (stopped.value.step, stopped.value.code) == (step, 143)
        newest = checkpoints(tmp_path / "stopped")[0]
        assert newest.name == f"checkpoint-{step}"
        assert is_extra(newest) == (step % every > 0 and step != steps)
    assert_same(run(tmp_path / "stopped", "ties-ca", settings), whole)


def test_a_callbacks_own_end_is_kept(tmp_path: Path) -> None:
    """Early stopping counts on from where it was, and a run that it had ended is not trained further."""
    settings = {
        **STEPS,
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "learning_rate": 1e-9,
    }

    def early() -> EarlyStoppingCallback:
        return EarlyStoppingCallback(early_stopping_patience=3)

    whole = run(tmp_path / "whole", "domain", settings, early())
    assert 0 < whole.state.global_step < whole.state.max_steps
    for step in range(2, whole.state.global_step):
        with pytest.raises(Stop):
            run(tmp_path / "stopped", "domain", settings, early(), StopAfter(step))
    assert_same(run(tmp_path / "stopped", "domain", settings, early()), whole)
    assert_same(run(tmp_path / "stopped", "domain", settings, early()), whole)  # from its end


def history(made: CamexTrainer) -> list[dict[str, float]]:
    """The log without times."""
    return [{k: v for k, v in e.items() if not k.endswith(TIMES)} for e in made.state.log_history]
