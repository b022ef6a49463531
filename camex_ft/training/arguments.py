"""From the configuration's ``training`` section to `transformers.TrainingArguments`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DynamoBackend
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames, ParallelMode
from transformers.utils import is_liger_kernel_available, is_torch_tf32_available

from camex_ft.config import TrainingConfig
from camex_ft.utils.errors import UserError, nearest

COMPILING = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
FOLLOWING = ("reduce_lr_on_plateau", "greedy")  # schedules that follow the metric of the evaluations
NEED_MODEL = ("galore", "apollo", "lomo", "adalomo")  # optimizers that are checked when there is a model


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
        UserError: the arguments contradict each other, or this machine cannot serve them.
    """
    options = training.arguments()
    checkpointing = (
        options.get("activation_checkpointing_kwargs")
        or options.pop("gradient_checkpointing_kwargs", None)
        or {}
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
        options["load_best_model_at_end"] = False
    else:
        defaults |= {"metric_for_best_model": best, "greater_is_better": greater_is_better}
        if options.get("lr_scheduler_type") in FOLLOWING:  # by default they take less of a metric for better
            mode = {"mode": "max" if greater_is_better else "min"}
            options["lr_scheduler_kwargs"] = {**mode, **(options.get("lr_scheduler_kwargs") or {})}
    options["activation_checkpointing_kwargs"] = {"use_reentrant": False, **checkpointing}
    processes = int(os.environ.get("WORLD_SIZE", 1))  # as launchers set it
    options["per_device_train_batch_size"] = training.rows_a_device(processes)
    if processes == 1:
        options.pop("ddp_backend", None)  # there is nothing to connect
    if options.get("tf32") and not is_torch_tf32_available():
        raise UserError(
            "training.tf32: needs a GPU of NVIDIA's Ampere generation or later, and there is none here: expected false"
        )
    try:
        arguments = TrainingArguments(output_dir=str(output), **{**defaults, **options})
    except (ValueError, ImportError, TypeError) as error:
        raise UserError(f"training: {error}") from error
    _check(arguments)
    return arguments


def _check(arguments: TrainingArguments) -> None:
    """Raise `UserError` for what would fail only when training begins, or hang in the middle of it."""
    if arguments.fp16 and arguments.device.type == "cpu":
        raise UserError("training.fp16: needs a GPU: expected bf16: true with use_cpu: true, or neither")
    if arguments.push_to_hub:
        raise UserError(
            "training.push_to_hub: a run writes to its own folder alone; expected false, and `camex-ft push` after the "
            "run"
        )
    if arguments.bf16 and arguments.fp16_full_eval:
        raise UserError(
            "training.fp16_full_eval: with bf16 evaluations are in bfloat16 already: expected bf16_full_eval: true, or "
            "neither"
        )
    if arguments.fp16 and arguments.bf16_full_eval:
        raise UserError(
            "training.bf16_full_eval: with fp16 evaluations are in float16 already: expected fp16_full_eval: true, or "
            "neither"
        )
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise UserError(
            "training.use_liger_kernel: needs the package liger-kernel: expected false, or `pip install liger-kernel`"
        )
    if arguments.torch_compile:
        _check_compiler(arguments)
    if arguments.fsdp and arguments.parallel_mode != ParallelMode.DISTRIBUTED:
        raise UserError(
            "training.fsdp: needs several processes to shard over: expected `camex-ft run ... --gpus N --engine fsdp`, "
            "or no fsdp"
        )
    if arguments.auto_find_batch_size and arguments.world_size > 1:
        raise UserError(
            "training.auto_find_batch_size: one of several processes runs out of memory by itself, and the others "
            "would wait for it: expected false, with a per_device_train_batch_size that `camex-ft plan` finds to fit"
        )
    _check_optimizer(arguments)
    _check_schedule(arguments)


def _check_compiler(arguments: TrainingArguments) -> None:
    """Raise `UserError` for a backend or a mode that `torch.compile` does not know."""
    backends = [each.value.lower() for each in DynamoBackend if each != DynamoBackend.NO]
    for key, word, known in (
        ("torch_compile_backend", arguments.torch_compile_backend, backends),
        ("torch_compile_mode", arguments.torch_compile_mode, COMPILING),
    ):
        if word is not None and word.lower() not in known:
            raise UserError(
                f"training.{key}: got '{word}', expected one of {', '.join(known)}.{nearest(word, known)}"
            )


def _check_optimizer(arguments: TrainingArguments) -> None:
    """Raise `UserError` for an optimizer that is not available here, or does not take its arguments."""
    name = OptimizerNames(arguments.optim).value
    if arguments.optim_args and not all(
        "=" in part for part in arguments.optim_args.replace(" ", "").split(",")
    ):
        raise UserError(
            f"training.optim_args: got '{arguments.optim_args}', expected names with values: name=value, name=value"
        )
    try:
        kind, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except Exception as error:  # a package that is missing or does not work here
        if isinstance(error, ValueError) and name.startswith(NEED_MODEL):
            return
        raise UserError(f"training.optim: {name} is not available here: {error}") from error
    try:
        kind([torch.nn.Parameter(torch.zeros(1, device=arguments.device))], **keywords)
    except Exception as error:
        raise UserError(f"training.optim: {name} cannot be used: {error}") from error


def _check_schedule(arguments: TrainingArguments) -> None:
    """Raise `UserError` for a schedule that does not take its options."""
    steps = arguments.max_steps if arguments.max_steps > 0 else 100
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=cast("dict[str, Any] | None", arguments.lr_scheduler_kwargs),
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"training.lr_scheduler_kwargs: {SchedulerType(arguments.lr_scheduler_type).value} does not take them: "
            f"{error}"
        ) from error
