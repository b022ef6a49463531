"""``training.auto_find_batch_size``: where a step runs out of memory, training starts over with half as many rows.

The run that comes of it is the one that had started with the size that was found, bit for bit: weights, buffers and
random state are put back to where they were, and nothing of what failed is left: no optimizer state, log line, routing,
time or checkpoint. A run that goes on from a checkpoint keeps the size that its checkpoint was written with.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from transformers.utils import logging

from camex_ft.training.checkpoint_folder import checkpoints
from camex_ft.training.engines import EngineTrainer
from camex_ft.training.saving import SavingTrainer
from camex_ft.training.state_files import random_state, set_random_state
from camex_ft.utils.errors import UserError

logger = logging.get_logger(__name__)
LESS = (
    "What else takes less memory: training.activation_checkpointing: true, training.bf16: true, a smaller "
    "task.max_length or merging.experts, tuning.mode: lora; `camex-ft plan` says how much"
)


class BatchSizeTrainer(SavingTrainer):
    """`SavingTrainer` that finds the number of rows that fit into memory."""

    def _inner_training_loop(
        self, batch_size: int | None = None, *args: Any, resume_from_checkpoint: Any = None, **kwargs: Any
    ) -> Any:
        rows = batch_size or self.args.train_batch_size
        given = {"resume_from_checkpoint": resume_from_checkpoint, **kwargs}
        if not self.args.auto_find_batch_size:
            return super()._inner_training_loop(batch_size, *args, **given)
        start = _Start(self)
        while True:
            # also for what is made of it, such as the order of rows that are grouped by length
            self.args.per_device_train_batch_size = rows // max(self.args.n_gpu, 1)
            try:
                return super()._inner_training_loop(rows, *args, **given)
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                if resume_from_checkpoint is not None:
                    raise UserError(
                        f"{Path(resume_from_checkpoint).name} was written by a run that takes {rows} rows at once, and "
                        f"now there is no memory for them: --force (make: FORCE=1) starts anew. {LESS}"
                    ) from error
                if rows == 1:
                    raise UserError(f"not even a single row fits into memory. {LESS}") from error
            # here nothing holds the error any more, whose frames hold the tensors of the pass that failed
            logger.warning(f"{rows} rows at once do not fit into memory: starting over with {rows // 2}")
            rows //= 2
            start.restore(self)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._evaluate(*args, **kwargs)
        except RuntimeError as error:
            if self.args.auto_find_batch_size and ran_out(error.__cause__ or error):
                raise UserError(
                    f"an evaluation ran out of memory, and training.auto_find_batch_size is about training alone: "
                    f"expected training.per_device_eval_batch_size below {self.args.per_device_eval_batch_size}"
                ) from error
            raise

    def start_over(self) -> None:
        """Forget everything about the training so far but the model."""
        self.current_flos = 0


def ran_out(error: BaseException) -> bool:
    """Return whether an error is about memory of a device or of the machine."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, Exception) and should_reduce_batch_size(error))


class _Start:
    """State in which training started. What is trained is copied to the machine's memory."""

    def __init__(self, trainer: EngineTrainer) -> None:
        self.tensors = {name: t.detach().to("cpu", copy=True) for name, t in _changing(trainer)}
        self.random = random_state()
        self.optimizer = trainer.optimizer  # None, where the trainer makes it
        self.state = None if self.optimizer is None else copy.deepcopy(self.optimizer.state_dict())
        self.checkpoints = set(checkpoints(Path(cast(str, trainer.args.output_dir))))

    @torch.no_grad()
    def restore(self, trainer: BatchSizeTrainer) -> None:
        """Put the trainer back to the start."""
        trainer.start_over()
        cast(nn.Module, trainer.model).zero_grad()
        trainer.optimizer = self.optimizer
        if self.optimizer is not None:
            self.optimizer.load_state_dict(cast(Any, self.state))
        for name, tensor in _changing(trainer):
            tensor.copy_(self.tensors[name])
        for folder in set(checkpoints(Path(cast(str, trainer.args.output_dir)))) - self.checkpoints:
            shutil.rmtree(folder)
        clear_device_cache(garbage_collection=True)
        set_random_state(self.random)


def _changing(trainer: EngineTrainer) -> list[tuple[str, Tensor]]:
    """Return by name what training may change: trained parameters, and buffers."""
    model = cast(nn.Module, trainer.model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [*trained, *model.named_buffers()]
