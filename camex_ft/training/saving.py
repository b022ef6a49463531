"""Checkpoints that are whole or absent, that a run goes on from as if it had never stopped, and signals to stop.

A checkpoint is the last thing of its step: at the end of an epoch that is after the epoch's own evaluation, which
otherwise a run that goes on would leave out. It holds what has been summed up since the last log line, too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from camex_ft.training import signals
from camex_ft.training.checkpoint_folder import (
    OPTIMIZER,
    STATE,
    is_extra,
    name_of,
    processes,
    rotate,
    state_of,
    training_file,
    write_manifest,
)
from camex_ft.training.engines import EngineTrainer
from camex_ft.training.order import set_epoch
from camex_ft.training.state_files import check_form, load_state, loading, save_state
from camex_ft.utils.durable import put, unfinished


class SavingTrainer(EngineTrainer):
    """`EngineTrainer` that can be stopped anywhere.

    Attributes:
        before_saving: called in the main process before a checkpoint gets its name: what it counts on is brought to
            the disk.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.before_saving: Callable[[], None] = lambda: None
        self._epoch_over = False  # the epoch's own evaluation is what comes next
        self._held = False  # a checkpoint waits for it
        self._written: int | None = None  # step of the last checkpoint
        self._resumed: Path | None = None  # where what was summed up is still to be read from
        self._agreeing: Tensor | None = None
        self._unproved: Path | None = None  # the state of the optimizer, until a step has been taken with it
        self._stepping: Path | None = None  # the same while that step is under way
        super().__init__(*args, **kwargs)
        self.add_callback(_Epochs(self))

    # -- stopping -----------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; a signal ends it after a step that is saved (`Stopped`), where the process listens to signals."""
        self._written, self._agreeing = None, None
        try:
            with signals.postponed():
                return super().train(*args, **kwargs)
        except Exception as error:
            if self._stepping is None:
                raise
            with loading(self._stepping):
                raise error

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: Any, trial: Any, *args: Any, **kw: Any
    ) -> None:
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kw)
        if self._closes_epoch():
            return  # comes through here once more
        if self._held:
            self._save_checkpoint(model, trial)
        number = self._asked_to_stop()
        if number:
            step = self.state.global_step
            if self._written != step:
                self._write(extra=True)
            self.accelerator.wait_for_everyone()  # nobody leaves before it is there
            raise signals.Stopped(number, step)

    def _closes_epoch(self) -> bool:
        """Return whether the step under way ends its epoch, whose own evaluation is still to come."""
        over = self.control.should_training_stop or self.control.should_epoch_stop
        return not self._epoch_over and (over or float(self.state.epoch or 0).is_integer())

    def _asked_to_stop(self) -> int:
        """Return the signal that asks any process to stop, the same in all, or 0.

        Of several processes it is the one of the call before, so that none has to wait for its device.
        """
        own = signals.noted() or 0
        if self.args.world_size <= 1:
            return own
        before, self._agreeing = self._agreeing, torch.tensor(own, device=self.args.device)
        dist.all_reduce(self._agreeing, dist.ReduceOp.MAX)
        return 0 if before is None else int(before)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._closes_epoch():
            self._held = True
            return
        self._write()

    def _write(self, *, extra: bool = False) -> None:
        """Write a checkpoint of this step.

        Args:
            extra: the settings ask for none here. It is to go on from, and the run that goes on must not notice: it
                is never the best one, and nothing is added up for it.
        """
        folder = Path(cast(str, self.args.output_dir))
        target = folder / name_of(self.state.global_step)
        draft = unfinished(target)
        if self.args.should_save:
            shutil.rmtree(draft, ignore_errors=True)
        if not extra:
            self.store_flos()
            self._held = False
            best = self.state.best_global_step
            there = best and (best == self.state.global_step or (folder / name_of(best)).is_dir())
            if there and not (best != self.state.global_step and is_extra(folder / name_of(cast(int, best)))):
                self.state.best_model_checkpoint = str(folder / name_of(cast(int, best)))
        self.accelerator.wait_for_everyone()
        try:
            self._fill(draft)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(draft, extra=extra)
                self.before_saving()
                put(draft, target)
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(draft, ignore_errors=True)  # a full disk gets its room back
            raise
        self._written = self.state.global_step
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate(
                folder,
                newest=target,
                limit=self.args.save_total_limit,
                best=self.state.best_model_checkpoint,
            )

    def _fill(self, draft: Path) -> None:
        draft.mkdir(parents=True, exist_ok=True)
        self.save_model(str(draft), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(draft))
            self._save_scaler(str(draft))
            self._save_rng_state(str(draft))
            save_state(self.summed_up(), draft / training_file(self.args.process_index))
        if self.args.should_save:
            self.state.stateful_callbacks = cast(Any, self._callback_states())
            self.state.save_to_json(str(draft / STATE))

    def _callback_states(self) -> dict[str, Any]:
        found: dict[str, list[Any]] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                found.setdefault(type(callback).__name__, []).append(callback.state())
        return {name: states[0] if len(states) == 1 else states for name, states in found.items()}

    # -- going on -----------------------------------------------------------------------------------------------------

    def summed_up(self) -> dict[str, Any]:
        """Return what this process has summed up that the model, the optimizer and the Trainer's state do not hold."""
        return {
            "loss": self._tr_loss,
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "operations": self.current_flos,
        }

    def check_sums(self, kept: dict[str, Any]) -> None:
        """Raise `ValueError` unless `kept` has the form of what `summed_up` returns."""
        like = {"loss": torch.tensor(0.0), "total_loss": 0.0, "last_logged": 0, "operations": 0}
        check_form(kept, like)
        if missing := like.keys() - kept.keys():
            raise ValueError(f"it has no {min(missing)}")
        if not 0 <= kept["last_logged"] <= self.state.global_step:
            raise ValueError(f"last_logged is {kept['last_logged']}, at step {self.state.global_step}")

    def take_up(self, kept: list[dict[str, Any]], own: int | None) -> None:
        """Take up what every process had summed up.

        Args:
            kept: what `summed_up` returned, by process.
            own: which of them this process is; None where they were another number, and the sums are dealt out.
        """
        losses = [each["loss"].to(self.args.device) for each in kept]
        mine = kept[own or 0]
        # of a log line, the mean over the processes counts
        self._tr_loss = torch.stack(losses).mean() if own is None else losses[own]
        self._total_loss_scalar, self._globalstep_last_logged = mine["total_loss"], mine["last_logged"]
        alone = sum(each["operations"] for each in kept) if self.args.process_index == 0 else 0
        self.current_flos = alone if own is None else mine["operations"]

    def _take_up_from(self, checkpoint: Path) -> None:
        count = processes(checkpoint)
        files = [checkpoint / training_file(process) for process in range(count)]
        if all(file.is_file() for file in files):
            own = self.args.process_index if count == self.args.world_size else None
            kept = []
            for file in files:
                with loading(file):
                    kept.append(load_state(file))
                    self.check_sums(kept[-1])
            self.take_up(kept, own)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        checkpoint = args[3] if len(args) > 3 else kwargs.get("resume_from_checkpoint")
        self._resumed = None if checkpoint is None else Path(checkpoint)
        if self._resumed is None:
            made = super()._init_training_state(*args, **kwargs)
        else:
            with loading(self._resumed / STATE):
                made = super()._init_training_state(*args, **kwargs)
        self._epoch_over = self._held = False
        if self._resumed is not None:
            self._unproved = self._resumed / OPTIMIZER
            best = state_of(self._resumed).best_model_checkpoint
            beside = None if best is None else self._resumed.parent / Path(best).name
            if beside is not None and beside.is_dir():  # also where the folder has been moved
                self.state.best_model_checkpoint = str(beside)
            with loading(self._resumed / STATE):
                self._restore_callbacks()
        return made

    def _restore_callbacks(self) -> None:
        """Give callbacks that have a state, such as early stopping, that of the checkpoint."""
        kept = cast(dict[str, Any], self.state.stateful_callbacks)
        left = {name: list(s) if isinstance(s, list) else [s] for name, s in kept.items()}
        for callback in self.callback_handler.callbacks:
            states = left.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and states:
                attributes, own = states.pop(0).get("attributes", {}), callback.state()["attributes"]
                check_form(attributes, own, type(callback).__name__)
                for name in attributes.keys() & own.keys():
                    setattr(callback, name, attributes[name])

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._resumed is not None:
            self._take_up_from(self._resumed)  # the loop has just set all to 0
            self._resumed = None
        set_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if self._resumed is not None:  # `eval_on_start`: that was done
            return {}
        return super()._evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Write a log line; the closing one's loss is the mean over all steps, also of a run that went on."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)

    def take_up_the_end(self, checkpoint: Path) -> None:
        """Take up a training that had come to its end at a checkpoint, and write its closing log line again."""
        self.state = state_of(checkpoint)
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.state.is_local_process_zero = self.is_local_process_zero()
        self._tr_loss, self._total_loss_scalar, self._globalstep_last_logged = torch.tensor(0.0), 0.0, 0
        self._take_up_from(checkpoint)
        self._total_loss_scalar += self._tr_loss.item()
        self.store_flos()
        self.log({"total_flos": self.state.total_flos, "train_loss": 0.0})


class _Epochs(TrainerCallback):
    """Tells the trainer which side of an epoch's end it is on, and when the first step after a checkpoint is taken."""

    def __init__(self, trainer: SavingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """No step is under way."""
        self.trainer._stepping = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step is taken: what is wrong with a loaded state may show only here."""
        self.trainer._stepping, self.trainer._unproved = self.trainer._unproved, None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The step has been taken."""
        self.trainer._stepping = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch begins."""
        self.trainer._epoch_over = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch has ended, but for its evaluation."""
        self.trainer._epoch_over = True
