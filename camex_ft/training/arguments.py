"""From the configuration's ``training`` section to `transformers.TrainingArguments`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from camex_ft.config import TrainingConfig


def training_arguments(training: TrainingConfig, *, output: Path, best: str | None) -> TrainingArguments:
    """Return the arguments of a run.

    Args:
        training: section of the configuration.
        output: where checkpoints go.
        best: name of the metric that chooses the best checkpoint, greater being better; None keeps the last one.
    """
    given = training.arguments()
    defaults: dict[str, Any] = {
        "report_to": "none",
        # every column is an input of the model: encoding dropped the others
        "remove_unused_columns": False,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    if best is None:
        given["load_best_model_at_end"] = False
    else:
        defaults |= {"metric_for_best_model": best, "greater_is_better": True}
    return TrainingArguments(output_dir=str(output), **{**defaults, **given})
