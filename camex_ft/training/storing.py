"""Content of a checkpoint's folder that the Trainer writes and reads: tensors and JSON, no pickle.

transformers writes optimizer, schedule, scaler, random state and its arguments with `torch.save`. Here the first four
are states (`stored`), in the folder ``state``; the arguments follow from the run's configuration and are not written.
DeepSpeed writes its own form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.training_args import OptimizerNames, ParallelMode

from camex_ft.training.checkpoint_folder import OPTIMIZER, SCALER, SCHEDULE, random_file
from camex_ft.training.state_files import (
    check_form,
    load_state,
    loading,
    random_state,
    save_state,
    set_random_state,
)
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
        check_form(optimizer.state_dict()["param_groups"], before, "param_groups")
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
                save_state(state, folder / OPTIMIZER)
            except TypeError as error:
                raise UserError(
                    f"training.optim: the state of {OptimizerNames(self.args.optim).value} cannot be stored: {error}; "
                    "expected another optimizer, or training.save_strategy: no"
                ) from error
            save_state(cast(Any, self.lr_scheduler).state_dict(), folder / SCHEDULE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with loading(Path(checkpoint) / OPTIMIZER):
            self.load_optimizer_state(load_state(Path(checkpoint) / OPTIMIZER))
        with loading(Path(checkpoint) / SCHEDULE):
            schedule = cast(Any, self.lr_scheduler)
            state = load_state(Path(checkpoint) / SCHEDULE)
            own = schedule.state_dict()
            check_form(state, own)
            if (
                "last_epoch" not in state or state.keys() - own.keys()
            ):  # torch's own sets whatever it is given
                raise ValueError(f"it is of another schedule: {sorted(map(str, state))!r:.200}")
            schedule.load_state_dict(state)

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            save_state(scaler.state_dict(), Path(output_dir) / SCALER)

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None and (Path(checkpoint) / SCALER).is_file():
            with loading(Path(checkpoint) / SCALER):
                state = load_state(Path(checkpoint) / SCALER)
                check_form(state, scaler.state_dict())
                scaler.load_state_dict(state)

    # -- randomness ---------------------------------------------------------------------------------------------------

    def _save_rng_state(self, output_dir: str) -> None:
        save_state(random_state(self._all_devices), Path(output_dir) / random_file(self.args.process_index))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Take up this process's random state; where another number of processes wrote, there may be none."""
        if checkpoint is None:
            return
        file = Path(checkpoint) / random_file(self.args.process_index)
        alone = self.args.world_size <= 1
        if file.is_file() and alone != (Path(checkpoint) / random_file(1)).is_file():
            with loading(file):
                set_random_state(load_state(file))

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
