"""Loss of an evaluation: the mean over all targets of a data set, whatever the batch size and the number of processes.

Targets are tokens of a text, else rows; each row counts once. transformers' own loss is a mean over batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainingArguments

Score = Callable[[str, Any], Mapping[str, float]]
Outputs = Callable[[Any, Mapping[str, Any]], tuple[Tensor | None, Any]]
IGNORED = -100  # label of a token that is no target


def loss_and_logits(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor | None, Any]:
    """Return the model's loss, or None without labels, and its logits [B, ...]."""
    outputs = model(**inputs)
    return (outputs.loss if "labels" in inputs else None), outputs.logits


class MeanLoss:
    """Mean loss over the targets of an evaluation's batches.

    Args:
        shifts_labels: each token is predicted from those before it, so that a row's first label is no target.
    """

    def __init__(self, *, shifts_labels: bool) -> None:
        self.shifts_labels = shifts_labels
        self.sums: list[Tensor] = []  # of each batch: sum over its targets, and their number

    def add(self, loss: Tensor, inputs: Mapping[str, Any], real_rows: int | None) -> None:
        """Add a batch's mean loss; with `real_rows` 0 it counts for nothing."""
        count = self._targets(inputs, loss) * (real_rows != 0)
        # the mean over no targets is NaN
        self.sums.append(torch.stack([torch.where(count > 0, loss.detach().mean() * count, 0), count]))

    def _targets(self, inputs: Mapping[str, Any], loss: Tensor) -> Tensor:
        """Return the number of targets of a batch: tokens or rows with a label."""
        labels = inputs.get("labels")
        if labels is None:
            return loss.new_tensor(rows_of(inputs))
        if labels.is_floating_point():
            return loss.new_tensor(labels.numel())
        return (labels[:, 1:] if self.shifts_labels else labels).ne(IGNORED).sum().to(loss.dtype)

    def over_processes(self, accelerator: Accelerator) -> float | None:
        """Return the mean over the targets of all processes, or None without any; every process has to call this."""
        if not self.sums:
            return None
        sums = torch.stack(self.sums).cpu().double().sum(0)
        if accelerator.num_processes > 1:
            sums = cast(Tensor, accelerator.reduce(sums.to(accelerator.device)))
        return float(sums[0] / sums[1]) if sums[1] else None


def rows_of(inputs: Mapping[str, Any]) -> int:
    """Return the number of rows of a batch."""
    return next(len(value) for value in inputs.values() if isinstance(value, Tensor))


def real_rows(inputs: Mapping[str, Any], accelerator: Accelerator) -> int | None:
    """Return how many rows of the last batch are this process's own, where others fill it up; None where none do."""
    state = accelerator.gradient_state
    if accelerator.num_processes <= 1 or not state.end_of_dataloader or state.remainder <= 0:
        return None
    rows = rows_of(inputs)
    return min(rows, max(0, state.remainder - accelerator.process_index * rows))


def half_evaluation(args: TrainingArguments | None) -> tuple[TrainingArguments | None, torch.dtype | None]:
    """Return the arguments without evaluation in half precision, and the dtype that they asked for.

    transformers would cast the model itself, which is saved afterwards; autocast leaves the weights alone.
    """
    if args is None or not (args.fp16_full_eval or args.bf16_full_eval):
        return args, None
    full = copy.copy(args)
    full.fp16_full_eval = full.bf16_full_eval = False
    return full, torch.float16 if args.fp16_full_eval else torch.bfloat16


@contextmanager
def every_row_in_order(args: TrainingArguments) -> Iterator[None]:
    """Make data loaders of evaluations take all rows in their order, which predictions are scored in."""
    changed = {"dataloader_drop_last": False, "train_sampling_strategy": "random"}
    before = {name: getattr(args, name) for name in changed}
    try:
        for name, value in changed.items():
            setattr(args, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)
