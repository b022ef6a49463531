"""Checkpoints that are whole or absent, from which a run continues as if it had never stopped; and signals to stop.

A checkpoint is the last action of its step: at the end of an epoch it follows the epoch's own evaluation, which a
resumed run would otherwise leave out. Besides model, optimizer and schedule it holds each process's random state and
running sums since the last log line. Nothing is pickled: states are safetensors files (`state_files`), transformers'
arguments follow from the run's configuration and are not written, and DeepSpeed writes its own form.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.training_args import OptimizerNames, ParallelMode

from camex_ft.training import signals
from camex_ft.training.callbacks.monitoring import LossGuard, Progress, RoutingMonitor
from camex_ft.training.checkpoint_folder import (
    OPTIMIZER,
    RANDOM,
    SCALER,
    SCHEDULE,
    STATE,
    TRAINING,
    is_extra,
    name_of,
    of_deepspeed,
    pickles,
    processes,
    rotate,
    rows_at_once,
    state_of,
    write_manifest,
)
from camex_ft.training.distributed import deal, dealt, gathered
from camex_ft.training.state_files import (
    check_form,
    load_state,
    loading,
    random_state,
    save_state,
    set_random_state,
)
from camex_ft.upcycling.adapters import has_adapter, trained_state
from camex_ft.utils.durable import put, unfinished
from camex_ft.utils.errors import UserError

# Optimizers whose kernels read as much of a state as the parameter has, whatever its own shape.
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


class CheckpointManager(TrainerCallback):
    """Writes and restores the checkpoints of a trainer, and stops it on a signal.

    As a callback it comes after the others, so that it restores what they begin anew.

    Args:
        trainer: writes its model by `save_model`.
        routing, progress, guard: running sums that are saved, and the guard that is asked before a checkpoint.

    Attributes:
        before_rename: called in the main process before a checkpoint gets its name, to bring to the disk what it
            counts on.
        resuming: checkpoint that training resumes from, until its first step begins.
    """

    def __init__(
        self, trainer: Trainer, *, routing: RoutingMonitor, progress: Progress, guard: LossGuard
    ) -> None:
        self.trainer: Any = trainer  # with the attributes of its training loop, which have no public names
        self.routing, self.progress, self.guard = routing, progress, guard
        self.before_rename: Callable[[], None] = lambda: None
        self.resuming: Path | None = None
        self._begin()

    def _begin(self) -> None:
        self._written: int | None = None  # step of the last checkpoint
        self._pending = False  # a checkpoint waits for the epoch's own evaluation
        self._epoch_over = False
        self._signal: Tensor | None = (
            None  # largest number of a signal that any process has, of the last step
        )
        self._untried: Path | None = None  # restored state of the optimizer, until it has taken a step
        self._tried: Path | None = None  # the same during that step

    @property
    def _args(self) -> TrainingArguments:
        return cast(TrainingArguments, self.trainer.args)

    # -- events of training -------------------------------------------------------------------------------------------

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Restore everything but the weights, which are loaded already, where training resumes."""
        self._begin()
        if self.resuming is not None:
            self._restore(self.resuming)

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Restore the random state at the start of an epoch, before its order is drawn."""
        self._epoch_over = False
        if self._args.ignore_data_skip or float(self.trainer.state.epoch or 0).is_integer():
            self._restore_random_state()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Restore the random state in the middle of an epoch, after its first batches are skipped."""
        self._restore_random_state()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Begin a step: a fault of a restored state may show only here."""
        self._tried, self._untried = self._untried, None

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """End a step."""
        self._tried = None

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """End the steps of an epoch; its evaluation follows."""
        self._epoch_over = True

    def end_step(self) -> None:
        """Write a checkpoint that has waited for the epoch's evaluation, and stop if a signal asks for it.

        Raises:
            Stopped: a signal asked to stop, and the step is saved.
        """
        if self._before_epoch_evaluation():
            return
        if self._pending:
            self.write()
        number = self._agreed_signal()
        if number:
            step = self.trainer.state.global_step
            if self._written != step:
                self.write(extra=True)
            self.trainer.accelerator.wait_for_everyone()  # nobody leaves before it is there
            raise signals.Stopped(number, step)

    def _before_epoch_evaluation(self) -> bool:
        """Return whether the current step ends its epoch, whose own evaluation is still to come."""
        control, epoch = self.trainer.control, self.trainer.state.epoch
        over = control.should_training_stop or control.should_epoch_stop
        return not self._epoch_over and (over or float(epoch or 0).is_integer())

    def _agreed_signal(self) -> int:
        """Return the signal that asks any process to stop, the same in all, or 0.

        With several processes it is that of the last step, so that none has to wait for its device.
        """
        own = signals.noted() or 0
        if self._args.world_size <= 1:
            return own
        before, self._signal = self._signal, torch.tensor(own, device=self._args.device)
        dist.all_reduce(self._signal, dist.ReduceOp.MAX)
        return 0 if before is None else int(before)

    def blame(self, error: Exception) -> None:
        """Raise `UserError` if an error came from the first step of a restored optimizer."""
        if self._tried is not None:
            with loading(self._tried):
                raise error

    # -- writing ------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a regular checkpoint: now, or after the epoch's own evaluation."""
        if self._before_epoch_evaluation():
            self._pending = True
        else:
            self.write()

    def write(self, *, extra: bool = False) -> None:
        """Write a checkpoint of this step under another name, and rename it when it is on the disk.

        Args:
            extra: it is written because of a signal, where there is no regular one. The resumed run must not notice:
                it is never the best one, and operations are not added up for it.
        """
        self.guard.check()  # a model that is not finite any more never replaces a good checkpoint
        trainer, state, wait = self.trainer, self.trainer.state, self.trainer.accelerator.wait_for_everyone
        folder = Path(cast(str, self._args.output_dir))
        target = folder / name_of(state.global_step)
        draft = unfinished(target)
        if self._args.should_save:
            shutil.rmtree(draft, ignore_errors=True)
        if not extra:
            trainer.store_flos()
            self._pending = False
            self._note_best(folder)
        wait()
        try:
            self._fill(draft)
            wait()
            if self._args.should_save:
                write_manifest(draft, extra=extra)
                self.before_rename()
                put(draft, target)
        except BaseException:
            if self._args.should_save:
                shutil.rmtree(draft, ignore_errors=True)  # a full disk gets its room back
            raise
        self._written = state.global_step
        wait()
        if self._args.should_save:
            limit, best = self._args.save_total_limit, state.best_model_checkpoint
            rotate(folder, newest=target, limit=limit, best=best)

    def _note_best(self, folder: Path) -> None:
        """Note the folder of the best step so far, if it has a regular checkpoint or gets it now."""
        state = self.trainer.state
        if not state.best_global_step:
            return
        best = folder / name_of(state.best_global_step)
        if state.best_global_step == state.global_step or (best.is_dir() and not is_extra(best)):
            state.best_model_checkpoint = str(best)

    def _fill(self, draft: Path) -> None:
        draft.mkdir(parents=True, exist_ok=True)
        trainer, rank = self.trainer, self._args.process_index
        trainer.save_model(str(draft), _internal_call=True)
        if not self._args.save_only_model:
            self._save_optimizer(draft)
            all_devices = self._args.parallel_mode == ParallelMode.DISTRIBUTED
            save_state(random_state(all_devices), draft / RANDOM.format(rank))
            save_state(self._sums(), draft / TRAINING.format(rank))
        if self._args.should_save:
            states: dict[str, list[Any]] = {}
            for callback in [*trainer.callback_handler.callbacks, trainer.control]:
                if isinstance(callback, ExportableState):
                    states.setdefault(type(callback).__name__, []).append(callback.state())
            trainer.state.stateful_callbacks = {n: s[0] if len(s) == 1 else s for n, s in states.items()}
            trainer.state.save_to_json(str(draft / STATE))

    def _save_optimizer(self, draft: Path) -> None:
        """Write optimizer, schedule and gradient scaler; sharded tensors are gathered by all processes."""
        trainer, writes = self.trainer, self._args.should_save
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None and writes:
            save_state(scaler.state_dict(), draft / SCALER)
        if trainer.is_deepspeed_enabled:
            trainer._save_optimizer_and_scheduler(str(draft))
            return
        state = trainer.optimizer.state_dict()
        if trainer.is_fsdp_enabled:
            state = gathered(state, writes=writes)
        if writes:
            try:
                save_state(state, draft / OPTIMIZER)
            except TypeError as error:
                raise UserError(
                    f"training.optim: the state of {OptimizerNames(self._args.optim).value} cannot be saved: {error}; "
                    "expected another optimizer, or training.save_strategy: no"
                ) from error
            save_state(trainer.lr_scheduler.state_dict(), draft / SCHEDULE)

    def _sums(self) -> dict[str, Any]:
        """Return the running sums of this process that the model, the optimizer and the Trainer's state do not hold."""
        trainer = self.trainer
        return {
            "loss": trainer._tr_loss,
            "total_loss": trainer._total_loss_scalar,
            "last_logged": trainer._globalstep_last_logged,
            "operations": trainer.current_flos,
            "routing": self.routing.sums,
            "rows_a_step": self.progress.largest_step(),
        }

    # -- resuming -----------------------------------------------------------------------------------------------------

    def check(self, checkpoint: Path) -> None:
        """Raise `UserError` where a run cannot resume from a checkpoint with its current processes."""
        anew = "--force (make: FORCE=1) starts anew"
        count, now = processes(checkpoint), self._args.world_size
        if of_deepspeed(checkpoint) != self.trainer.is_deepspeed_enabled:
            raise UserError(
                f"{checkpoint.name} was written {'by' if of_deepspeed(checkpoint) else 'without'} DeepSpeed, whose "
                f"checkpoints it alone reads: expected the engine of before; {anew}"
            )
        if self.trainer.is_deepspeed_enabled and count != now:
            raise UserError(
                f"{checkpoint.name} was written by {count} processes, and here are {now}: DeepSpeed resumes with the "
                f"same number alone, ddp and fsdp with any; {anew}"
            )
        before = rows_at_once(checkpoint)
        size = before // count if self._args.auto_find_batch_size else self._args.train_batch_size
        rows = size * now
        if before and before != rows:
            raise UserError(
                f"{checkpoint.name} was written by a run that takes {before} rows at once, and {now} processes of "
                f"{size} take {rows}: expected {count} processes as before, or "
                f"training.global_batch_size from the start; {anew}"
            )

    def resume_from(self, checkpoint: str | None) -> None:
        """Note the checkpoint that training resumes from; transformers must not find pickles in it."""
        self.resuming = None if checkpoint is None else Path(checkpoint)
        if self.resuming is not None and (names := pickles(self.resuming)):
            raise UserError(
                f"training.resume: {checkpoint} holds {names[0]}, a pickle, which no run writes or reads"
            )

    @torch.no_grad()
    def load_weights(self, checkpoint: Path) -> None:
        """Load the weights of a checkpoint, one file at a time; of sharded ones each process takes its part.

        Raises:
            UserError: the checkpoint is of another model.
        """
        model = cast(nn.Module, self.trainer.model)
        own = model.state_dict(keep_vars=True)
        expected = trained_state(model) if has_adapter(model) else own
        loaded: set[int] = set()
        with loading(checkpoint):
            for file in sorted(checkpoint.glob("*.safetensors")):
                with safe_open(file, "pt") as saved:
                    for name in list(saved.keys()):
                        tensor = saved.get_tensor(name)
                        if name not in own or tensor.shape != own[name].shape:
                            raise ValueError(f"the model has no {name} of shape {list(tensor.shape)}")
                        own[name].copy_(deal(tensor, own[name]))
                        loaded.add(id(own[name]))  # the same for names that share it
            missing = [name for name in expected if id(own[name]) not in loaded]
            if missing:
                raise ValueError(f"it has no {missing[0]}")

    def _restore(self, checkpoint: Path) -> None:
        """Restore optimizer, schedule, scaler, callbacks and running sums."""
        trainer = self.trainer
        recorded = state_of(checkpoint).best_model_checkpoint
        beside = None if recorded is None else checkpoint.parent / Path(recorded).name
        if beside is not None and beside.is_dir():  # also where the folder has been moved
            trainer.state.best_model_checkpoint = str(beside)
        with loading(checkpoint / STATE):
            self._restore_callbacks()
        if not trainer.is_deepspeed_enabled:
            self._restore_optimizer(checkpoint)
        self._restore_sums(checkpoint)
        self._untried = checkpoint / OPTIMIZER

    def _restore_callbacks(self) -> None:
        """Restore callbacks that have a state, such as early stopping."""
        saved = cast(dict[str, Any], self.trainer.state.stateful_callbacks)
        left = {name: list(s) if isinstance(s, list) else [s] for name, s in saved.items()}
        for callback in self.trainer.callback_handler.callbacks:
            states = left.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and states:
                attributes, own = states.pop(0).get("attributes", {}), callback.state()["attributes"]
                check_form(attributes, own, type(callback).__name__)
                for name in attributes.keys() & own.keys():
                    setattr(callback, name, attributes[name])

    def _restore_optimizer(self, checkpoint: Path) -> None:
        """Restore optimizer, schedule and gradient scaler, each after its form is checked."""
        trainer, optimizer = self.trainer, self.trainer.optimizer
        with loading(checkpoint / OPTIMIZER):
            groups = optimizer.state_dict()["param_groups"]
            state = load_state(checkpoint / OPTIMIZER)
            optimizer.load_state_dict(dealt(state, optimizer) if trainer.is_fsdp_enabled else state)
            check_form(optimizer.state_dict()["param_groups"], groups, "param_groups")
            if isinstance(getattr(optimizer, "optimizer", optimizer), FUSED):  # accelerate's has it inside
                _check_shapes(optimizer)
        with loading(checkpoint / SCHEDULE):
            schedule, state = trainer.lr_scheduler, load_state(checkpoint / SCHEDULE)
            own = schedule.state_dict()
            check_form(state, own)
            if "last_epoch" not in state or state.keys() - own.keys():  # torch's own accept any key
                raise ValueError(f"it is of another schedule: {sorted(map(str, state))!r:.200}")
            schedule.load_state_dict(state)
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None and (checkpoint / SCALER).is_file():
            with loading(checkpoint / SCALER):
                state = load_state(checkpoint / SCALER)
                check_form(state, scaler.state_dict())
                scaler.load_state_dict(state)

    def _restore_random_state(self) -> None:
        """Restore this process's random state, which ends resuming; none where the number of processes has changed."""
        checkpoint, self.resuming = self.resuming, None
        if checkpoint is None:
            return
        file = checkpoint / RANDOM.format(self._args.process_index)
        alone = self._args.world_size <= 1
        if file.is_file() and alone != (checkpoint / RANDOM.format(1)).is_file():
            with loading(file):
                set_random_state(load_state(file))

    def _restore_sums(self, checkpoint: Path) -> None:
        """Restore the running sums; with another number of processes than before, deal out their totals."""
        count, rank = processes(checkpoint), self._args.process_index
        saved = []
        for file in [checkpoint / TRAINING.format(process) for process in range(count)]:
            if not file.is_file():
                return
            with loading(file):
                saved.append(load_state(file))
                self._check_sums(saved[-1])
        trainer, same = self.trainer, count == self._args.world_size
        losses = [sums["loss"].to(self._args.device) for sums in saved]
        # of a log line, the mean over the processes counts
        trainer._tr_loss = losses[rank] if same else torch.stack(losses).mean()
        own = saved[rank if same else 0]
        trainer._total_loss_scalar, trainer._globalstep_last_logged = own["total_loss"], own["last_logged"]
        self.progress.largest_step_before = saved[0].get("rows_a_step", 0)  # earlier versions did not count
        if same:
            trainer.current_flos, self.routing.sums = own["operations"], own["routing"]
            return
        first = rank == 0  # the others begin with nothing, of the same layers
        trainer.current_flos = sum(sums["operations"] for sums in saved) if first else 0
        totals = {n: torch.stack([sums["routing"][n] for sums in saved]).sum(0) for n in own["routing"]}
        self.routing.sums = {n: s if first else torch.zeros_like(s) for n, s in totals.items()}

    def _check_sums(self, sums: dict[str, Any]) -> None:
        """Raise `ValueError` unless `sums` have the form of `_sums`."""
        like = {"loss": torch.tensor(0.0), "total_loss": 0.0, "last_logged": 0, "operations": 0}
        check_form(sums, like)
        if missing := like.keys() - sums.keys():
            raise ValueError(f"it has no {min(missing)}")
        step = self.trainer.state.global_step
        if not 0 <= sums["last_logged"] <= step:
            raise ValueError(f"last_logged is {sums['last_logged']}, at step {step}")
        self.routing.check_sums(sums.get("routing"))

    def restore_end(self, checkpoint: Path) -> None:
        """Restore the state of a training that had ended at a checkpoint, and write its closing log line again."""
        trainer = self.trainer
        trainer.state = state_of(checkpoint)
        trainer.state.is_world_process_zero = trainer.is_world_process_zero()
        trainer.state.is_local_process_zero = trainer.is_local_process_zero()
        trainer._tr_loss, trainer._total_loss_scalar, trainer._globalstep_last_logged = (
            torch.tensor(0.0),
            0.0,
            0,
        )
        self._restore_sums(checkpoint)
        trainer._total_loss_scalar += trainer._tr_loss.item()
        trainer.store_flos()
        trainer.log({"total_flos": trainer.state.total_flos, "train_loss": 0.0})


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    """Raise `ValueError` unless the state of each parameter has its shape; the count of steps is a scalar."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            shape = torch.Size([]) if name == "step" else parameter.shape
            if isinstance(value, Tensor) and value.shape != shape:
                raise ValueError(f"{name} is of {list(value.shape)}, expected {list(shape)}")
