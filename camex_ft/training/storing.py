"""Content of a checkpoint's folder that the Trainer writes and reads: tensors and JSON, no pickle.

transformers writes optimizer, schedule, scaler, random state and its arguments with `torch.save`. Here the first four
are states (`stored`), in the folder ``state``; the arguments follow from the run's configuration and are not written.
DeepSpeed writes its own form.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.training_args import OptimizerNames, ParallelMode

from camex_ft.training import stored
from camex_ft.training.checkpoints import OPTIMIZER, SCALER, SCHEDULE, random_file
from camex_ft.utils.errors import UserError

# Optimizers with kernels that read as much of a state as the parameter has, however much there is.
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


class StoringTrainer(Trainer):
    """`transformers.Trainer` whose checkpoints are read without running anything."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write model and tokenizer, in the processes that write."""
        if not self.args.should_save:
            return
        folder = output_dir or cast(str, self.args.output_dir)
        cast(PreTrainedModel, self.model).save_pretrained(folder, state_dict=state_dict)
        if self.processing_class is not None:
            cast(Any, self.processing_class).save_pretrained(folder)

    # -- optimizer and schedule ---------------------------------------------------------------------------------------

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state as one process has it; every process takes part where it is gathered."""
        return cast(torch.optim.Optimizer, self.optimizer).state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Take up what `optimizer_state` returned."""
        optimizer = cast(torch.optim.Optimizer, self.optimizer)
        before = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(state)
        stored.check_form(optimizer.state_dict()["param_groups"], before, "param_groups")
        if isinstance(getattr(optimizer, "optimizer", optimizer), FUSED):  # accelerate's has it inside
            _check_shapes(optimizer)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = self.optimizer_state()
        if self.args.should_save:
            try:
                stored.save(state, folder / OPTIMIZER)
            except TypeError as error:
                raise UserError(
                    f"training.optim: the state of {OptimizerNames(self.args.optim).value} cannot be stored: {error}; "
                    "expected another optimizer, or training.save_strategy: no"
                ) from error
            stored.save(cast(Any, self.lr_scheduler).state_dict(), folder / SCHEDULE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with stored.fitting(Path(checkpoint) / OPTIMIZER):
            self.load_optimizer_state(stored.load(Path(checkpoint) / OPTIMIZER))
        with stored.fitting(Path(checkpoint) / SCHEDULE):
            schedule = cast(Any, self.lr_scheduler)
            state = stored.load(Path(checkpoint) / SCHEDULE)
            own = schedule.state_dict()
            stored.check_form(state, own)
            if (
                "last_epoch" not in state or state.keys() - own.keys()
            ):  # torch's own sets whatever it is given
                raise ValueError(f"it is of another schedule: {sorted(map(str, state))!r:.200}")
            schedule.load_state_dict(state)

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            stored.save(scaler.state_dict(), Path(output_dir) / SCALER)

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None and (Path(checkpoint) / SCALER).is_file():
            with stored.fitting(Path(checkpoint) / SCALER):
                state = stored.load(Path(checkpoint) / SCALER)
                stored.check_form(state, scaler.state_dict())
                scaler.load_state_dict(state)

    # -- randomness ---------------------------------------------------------------------------------------------------

    def _save_rng_state(self, output_dir: str) -> None:
        stored.save(random_state(self._all_devices), Path(output_dir) / random_file(self.args.process_index))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Take up this process's random state; where another number of processes wrote, there may be none."""
        if checkpoint is None:
            return
        file = Path(checkpoint) / random_file(self.args.process_index)
        alone = self.args.world_size <= 1
        if file.is_file() and alone != (Path(checkpoint) / random_file(1)).is_file():
            with stored.fitting(file):
                set_random_state(stored.load(file), self._all_devices)

    @property
    def _all_devices(self) -> bool:
        return self.args.parallel_mode == ParallelMode.DISTRIBUTED


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    """Raise `ValueError` unless the state of each parameter has its shape, but for the count of steps."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            shape = torch.Size([]) if name == "step" else parameter.shape
            if isinstance(value, Tensor) and value.shape != shape:
                raise ValueError(f"{name} is of {list(value.shape)}, expected {list(shape)}")


def random_state(all_devices: bool = True) -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators; of all GPUs, or the current one alone."""
    made = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        made["cuda"] = torch.cuda.get_rng_state_all() if all_devices else torch.cuda.get_rng_state()
    return made


def set_random_state(state: dict[str, Any], all_devices: bool = True) -> None:
    """Take up what `random_state` returned, of the GPUs where they are as many as then."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    kept = state.get("cuda")
    if kept is None or not torch.cuda.is_available():
        return
    if isinstance(kept, Tensor):
        torch.cuda.set_rng_state(kept)
    elif len(kept) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(kept)
