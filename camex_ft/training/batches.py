"""Batches of training and evaluation: the order of their rows, how many fit into memory, and the mean of their losses.

With ``auto_find_batch_size``, where a step runs out of memory, training starts over with half as many rows. The result
is the run that starts with that size, bit for bit: weights, buffers and random state are restored, and nothing of the
failed attempt is left. A run that is resumed takes the size of its checkpoint.

The loss of an evaluation is the mean over all targets of a data set, whatever the batch size and the number of
processes. Targets are tokens of a text, else rows; each row counts once. transformers' own loss is a mean over batches.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from camex_ft.training.checkpoint_folder import checkpoints
from camex_ft.training.state_files import random_state, set_random_state

LESS = (
    "What else takes less memory: training.activation_checkpointing: true, training.bf16: true, a smaller "
    "task.max_length or merging.experts, tuning.mode: lora; `camex-ft plan` says how much"
)
Score = Callable[[str, Any], Mapping[str, float]]
Outputs = Callable[[Any, Mapping[str, Any]], tuple[Tensor | None, Any]]
IGNORED = -100  # label of a token that is no target


class EpochSampler(Sampler[int]):
    """Length-grouped sampler whose order follows from seed and epoch alone, so that a resumed run repeats it."""

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)


def set_epoch(dataloader: Any, epoch: int) -> None:
    """Choose the order of an epoch for all samplers of a data loader, however they are wrapped.

    With several processes, resuming in the middle of an epoch adds a wrapper that does not pass the epoch on: the rows
    would be those of the first epoch.
    """
    wrapped: list[Any] = [dataloader]
    for part in wrapped:
        for name in ("batch_sampler", "sampler"):
            inner = getattr(part, name, None)
            if inner is not None and not any(inner is other for other in wrapped):
                wrapped.append(inner)
        if part is not dataloader and hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


class EpochOrder(TrainerCallback):
    """Callback that sets the epoch of all samplers of the training data."""

    def on_train_begin(self, args: Any, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        """Start from the epoch of the state, which is that of a checkpoint where training resumes."""
        self.epoch = int(state.epoch or 0)

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Set the epoch."""
        set_epoch(kwargs["train_dataloader"], self.epoch)
        self.epoch += 1


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device or the machine has no memory left."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, Exception) and should_reduce_batch_size(error))


class TrainingStart:
    """Copy of everything that training changes, in the machine's memory, to start over from."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.folder = Path(cast(str, trainer.args.output_dir))
        self.tensors = {name: t.detach().to("cpu", copy=True) for name, t in self._changing()}
        self.random = random_state()
        self.optimizer = trainer.optimizer  # None unless the caller made it
        self.optimizer_state = None if self.optimizer is None else copy.deepcopy(self.optimizer.state_dict())
        self.checkpoints = set(checkpoints(self.folder))

    def _changing(self) -> list[tuple[str, Tensor]]:
        """Return trained parameters and buffers by name."""
        model = cast(nn.Module, self.trainer.model)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return [*trained, *model.named_buffers()]

    @torch.no_grad()
    def restore(self) -> None:
        """Undo the training so far; callbacks begin again by themselves, in `on_train_begin`."""
        cast(nn.Module, self.trainer.model).zero_grad()
        self.trainer.current_flos = 0
        self.trainer.optimizer = self.optimizer
        if self.optimizer is not None:
            self.optimizer.load_state_dict(cast(Any, self.optimizer_state))
        for name, tensor in self._changing():
            tensor.copy_(self.tensors[name])
        for folder in set(checkpoints(self.folder)) - self.checkpoints:
            shutil.rmtree(folder)
        clear_device_cache(garbage_collection=True)
        set_random_state(self.random)


# -- evaluation --------------------------------------------------------------------------------------------------------


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
