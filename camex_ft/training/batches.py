"""Batches of training: the order of their rows, and with ``auto_find_batch_size`` how many rows fit into memory.

Where a step runs out of memory, training starts over with half as many rows. The result is the run that starts with
that size, bit for bit: weights, buffers and random state are restored, and nothing of the failed attempt is left. A run
that is resumed takes the size of its checkpoint.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from camex_ft.training.checkpoint_folder import checkpoints
from camex_ft.training.state_files import random_state, set_random_state

LESS = (
    "What else takes less memory: training.activation_checkpointing: true, training.bf16: true, a smaller "
    "task.max_length or merging.experts, tuning.mode: lora; `camex-ft plan` says how much"
)


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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from the epoch of the state, which is that of a checkpoint where training resumes."""
        self.epoch = int(state.epoch or 0)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
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
