"""Invariant 8, second half: train, stop at any step, go on: the same weights, bit for bit, as never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_runs import STEPS_AN_EPOCH, model, same, trainer, weights
from transformers import TrainerCallback

from camex_ft.training.checkpoints import choose
from camex_ft.training.trainer import CamexTrainer

EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch"}
STEPS = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 3, "save_steps": 3}


class Stop(Exception):
    """What a killed process looks like from inside."""


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Stop


def run(folder: Path, protocol: str, settings: dict[str, Any], *callbacks: TrainerCallback) -> CamexTrainer:
    made = trainer(
        folder,
        model(protocol),
        callbacks=callbacks,
        load_best_model_at_end=False,
        save_total_limit=2,
        **settings,
    )
    checkpoint, notes = choose("auto", folder)
    assert notes == []
    made.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return made


@pytest.mark.parametrize(
    ("protocol", "settings", "stop", "saved"),
    [
        ("ties-ca", EPOCHS, STEPS_AN_EPOCH, STEPS_AN_EPOCH),
        ("dare-ca", STEPS, 5, 3),  # in the middle of an epoch, and a step after what was saved
        ("smoe", {**STEPS, "train_sampling_strategy": "random", "gradient_accumulation_steps": 2}, 3, 3),
        ("fisher", {**STEPS, "gradient_accumulation_steps": 2}, 3, 3),
        ("namex-full", STEPS, 4, 3),
        ("domain", {**EPOCHS, "train_sampling_strategy": "random"}, STEPS_AN_EPOCH + 2, STEPS_AN_EPOCH),
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
    resumed = run(tmp_path / "stopped", protocol, settings)
    assert same(weights(resumed), weights(whole)) == []
    assert history(resumed) == history(whole)


def history(made: CamexTrainer) -> list[dict[str, float]]:
    """The log without timings, and without means over steps of which a resumed run has seen only the last."""
    left_out = ("runtime", "per_second", "flos", "train_loss", "routing_entropy", "routing_max_load")
    return [
        {k: v for k, v in e.items() if k != "loss" and not k.endswith(left_out)}
        for e in made.state.log_history
    ]
