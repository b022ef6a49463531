"""From the configuration's ``training`` section to `transformers.TrainingArguments`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_tf32_available

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
    checkpointing = (
        given.get("activation_checkpointing_kwargs") or given.pop("gradient_checkpointing_kwargs", None) or {}
    )
    if checkpointing.get("use_reentrant"):
        raise UserError(
            "training.activation_checkpointing_kwargs: use_reentrant would lose the balance loss; expected false"
        )
    defaults: dict[str, Any] = {
        "report_to": "none",
        "remove_unused_columns": False,  # encoding left only inputs of the model
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,  # whatever is trained has a gradient in every step
        "data_seed": training.seed,  # else each process would order the rows by a seed of its own
    }
    if best is None:
        given["load_best_model_at_end"] = False
    else:
        defaults |= {"metric_for_best_model": best, "greater_is_better": greater_is_better}
    given["activation_checkpointing_kwargs"] = {"use_reentrant": False, **checkpointing}
    processes = int(os.environ.get("WORLD_SIZE", 1))  # as launchers set it
    given["per_device_train_batch_size"] = training.rows_a_device(processes)
    if given.get("tf32") and not is_torch_tf32_available():
        raise UserError(
            "training.tf32: no GPU here has it; those of NVIDIA's Ampere generation and later do: expected false"
        )
    try:
        made = TrainingArguments(output_dir=str(output), **{**defaults, **given})
    except (ValueError, ImportError, TypeError) as error:
        raise UserError(f"training: {error}") from error
    _check(made)
    return made


def _check(made: TrainingArguments) -> None:
    """Raise `UserError` for what would fail only when training begins, or hang in the middle of it."""
    if made.fp16 and made.device.type == "cpu":
        raise UserError("training.fp16: needs a GPU: expected bf16: true, which a CPU has too, or neither")
    if made.push_to_hub:
        raise UserError(
            "training.push_to_hub: a run keeps what it makes here; expected false, and `camex-ft push` once it is done"
        )
    if made.auto_find_batch_size and made.world_size > 1:
        raise UserError(
            "training.auto_find_batch_size: one of several processes runs out of memory by itself, and the others "
            "would wait for it: expected false, with a per_device_train_batch_size that `camex-ft plan` finds to fit"
        )
    try:
        Trainer.get_optimizer_cls_and_kwargs(made)
    except Exception as error:  # a package that is not there, or does not work here
        without = isinstance(error, ValueError) and not isinstance(error.__context__, ImportError)
        if not without:  # those that ask for the model do so once it is there
            raise UserError(
                f"training.optim: {OptimizerNames(made.optim).value} cannot be had here: {error}"
            ) from error
