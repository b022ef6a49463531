"""From the section ``training`` to `transformers.TrainingArguments`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from camex_ft.config import TrainingConfig
from camex_ft.training.arguments import training_arguments
from camex_ft.utils.errors import UserError


def arguments(best: str | None = "eval_validation_f1", **given: Any) -> Any:
    training = TrainingConfig.model_validate({"use_cpu": True, **given})
    return training_arguments(training, output=Path("somewhere"), best=best)


def test_the_section_is_handed_on() -> None:
    made = arguments(
        learning_rate=3e-4, warmup_steps=7, num_train_epochs=2.5, lr_scheduler_type="cosine", seed=9
    )
    assert (made.learning_rate, made.warmup_steps, made.num_train_epochs, made.seed) == (3e-4, 7, 2.5, 9)
    assert made.lr_scheduler_type == "cosine"
    assert made.output_dir == "somewhere" and made.report_to == []
    assert made.remove_unused_columns is False


def test_the_best_checkpoint_is_the_one_with_the_greatest_metric() -> None:
    made = arguments()
    assert made.load_best_model_at_end and made.greater_is_better
    assert made.metric_for_best_model == "eval_validation_f1"


def test_or_the_one_with_the_least() -> None:
    training = TrainingConfig.model_validate({"use_cpu": True})
    made = training_arguments(
        training, output=Path("x"), best="eval_validation_perplexity", greater_is_better=False
    )
    assert made.metric_for_best_model == "eval_validation_perplexity"
    assert made.greater_is_better is False


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize(("greater", "mode"), [(True, "max"), (False, "min")])
def test_schedules_that_follow_a_metric_know_which_way_is_better(
    schedule: str, greater: bool, mode: str
) -> None:
    def options(**given: Any) -> Any:
        section = {"use_cpu": True, "lr_scheduler_type": schedule, **given}
        training = TrainingConfig.model_validate(section)
        made = training_arguments(training, output=Path("x"), best="eval_f1", greater_is_better=greater)
        return made.lr_scheduler_kwargs

    assert options() == {"mode": mode}
    assert options(lr_scheduler_kwargs={"patience": 3, "mode": "min"}) == {"patience": 3, "mode": "min"}


def test_without_a_metric_the_last_checkpoint_counts() -> None:
    made = arguments(best=None, load_best_model_at_end=True)
    assert not made.load_best_model_at_end and made.metric_for_best_model is None


def test_checkpointing_is_not_reentrant_unless_asked_for() -> None:
    assert arguments().activation_checkpointing_kwargs == {"use_reentrant": False}
    given = {"determinism_check": "none"}
    merged = arguments(activation_checkpointing_kwargs=given).activation_checkpointing_kwargs
    assert merged == {"use_reentrant": False, **given}


def test_ddp_looks_for_no_unused_parameters_unless_asked_to() -> None:
    """Whatever is trained has a gradient in every step: `tests/distributed/test_matrix.py` would hang or raise."""
    assert arguments().ddp_find_unused_parameters is False
    assert arguments(ddp_find_unused_parameters=True).ddp_find_unused_parameters is True


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "epoch"},
            "training: .*load_best_model_at_end",
        ),
        ({"eval_strategy": "epoch", "fp16": True, "bf16": True}, "training: .*fp16"),
        (
            {"activation_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant would lose the balance loss",
        ),
    ],
)
def test_contradictions_are_the_user_s(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"(?s){said}"):
        arguments(**given)
