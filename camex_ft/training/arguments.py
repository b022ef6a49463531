"""From the configuration's ``training`` section to `transformers.TrainingArguments`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from camex_ft.config import TrainingConfig
from camex_ft.errors import UserError


def training_arguments(
    training: TrainingConfig, *, output: Path, best: str | None, greater_is_better: bool = True
) -> TrainingArguments:
    """Return the arguments of a run.

    Args:
        training: section of the configuration.
        output: where checkpoints go.
        best: name of the metric that chooses the best checkpoint; None keeps the last one.
        greater_is_better: whether more of that metric is better.

    Raises:
        UserError: the arguments contradict each other, or ask for what this machine has not.
    """
    given = training.arguments()
    checkpointing = given.get("activation_checkpointing_kwargs") or {}
    if checkpointing.get("use_reentrant"):
        raise UserError(
            "training.activation_checkpointing_kwargs: use_reentrant would lose the balance loss; expected false"
        )
    defaults: dict[str, Any] = {
        "report_to": "none",
        "remove_unused_columns": False,  # encoding left only inputs of the model
        "dataloader_pin_memory": torch.cuda.is_available(),
        "data_seed": training.seed,  # else each process would order the rows by a seed of its own
    }
    if best is None:
        given["load_best_model_at_end"] = False
    else:
        defaults |= {"metric_for_best_model": best, "greater_is_better": greater_is_better}
    given["activation_checkpointing_kwargs"] = {"use_reentrant": False, **checkpointing}
    if training.global_batch_size is not None:
        parts = given.get("gradient_accumulation_steps") or 1
        given["per_device_train_batch_size"] = rows_a_device(training.global_batch_size, parts=parts)
    try:
        return TrainingArguments(output_dir=str(output), **{**defaults, **given})
    except (ValueError, ImportError, TypeError) as error:
        raise UserError(f"training: {error}") from error


def rows_a_device(rows: int, *, parts: int) -> int:
    """Return how many of the rows of an optimizer step a device takes at a time.

    Raises:
        UserError: they do not share out evenly.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))  # as launchers set it
    if rows % (processes * parts):
        raise UserError(
            f"training.global_batch_size: {rows} rows do not share out evenly among {processes} processes and {parts} "
            f"micro-batches; expected a multiple of {processes * parts}"
        )
    return rows // (processes * parts)
