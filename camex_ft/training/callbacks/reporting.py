"""Reports of a training: the history of its run, and the trackers of `training.report_to`.

TensorBoard, Weights & Biases and the like write below the run's folder ``logs``. Most of them read a variable of the
environment for that, some only when they begin to log. A variable that the user has set stays.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import CodeCarbonCallback, DVCLiveCallback, get_reporting_integration_callbacks

EVAL = "eval_"
# Suffixes of an evaluation's cost: time, and with `skip_memory_metrics: false` memory.
COST = (
    *("runtime", "samples_per_second", "steps_per_second", "preparation_time"),
    *("alloc_delta", "peaked_delta"),
)


class HistoryCallback(TrainerCallback):
    """Callback that hands every log entry, with its step and epoch, to `write`, in the main process alone.

    Args:
        write: takes an entry.
        rewind: drops the entries after a step, which will be written again, as after an attempt that ran out of memory.
        loads: returns the load by layer since the last training entry, added to each as ``routing_load``. The log
            itself, which is for people, goes without it.
    """

    def __init__(
        self,
        write: Callable[[dict[str, Any]], None],
        loads: Callable[[], Mapping[str, list[float]]] = dict,
        rewind: Callable[[int], None] | None = None,
    ) -> None:
        self.write, self.loads, self.rewind = write, loads, rewind

    def on_train_begin(self, args: Any, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        """Drop the entries of an earlier attempt."""
        if self.rewind is not None and state.is_world_process_zero:
            self.rewind(state.global_step)

    def on_log(self, args: Any, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        """Write one entry."""
        if state.is_world_process_zero:
            entry = {"step": state.global_step, "epoch": state.epoch, **(kwargs.get("logs") or {})}
            loads = self.loads() if "loss" in entry else {}
            if loads:
                entry["routing_load"] = {
                    layer: [round(x, 4) for x in shares] for layer, shares in loads.items()
                }
            self.write(entry)


class Outcome(NamedTuple):
    """Best and last value of a metric, and the epoch of the best."""

    best: float | None
    best_epoch: float | None
    last: float | None


def only_metrics(entry: Mapping[str, Any], *, prefix: str = EVAL) -> dict[str, float]:
    """Return the metrics of an evaluation's log entry, without the prefix, time and memory."""
    return {
        k.removeprefix(prefix): v for k, v in entry.items() if k.startswith(prefix) and not k.endswith(COST)
    }


def epochs(log_history: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return one entry an evaluation: step, epoch and the metrics of all data sets, as `only_metrics` has them."""
    rows: dict[int, dict[str, float]] = {}
    for entry in log_history:
        metrics = only_metrics(entry)
        if metrics:
            row = rows.setdefault(entry["step"], {"step": entry["step"], "epoch": entry["epoch"]})
            row.update(metrics)
    return list(rows.values())


def best_and_last(rows: list[dict[str, float]], metric: str, *, greater_is_better: bool = True) -> Outcome:
    """Return the outcome in `metric`; the first of equal epochs is the best one."""
    scored = [row for row in rows if row.get(metric) is not None and row[metric] == row[metric]]
    if not scored:
        return Outcome(None, None, None)
    best = (max if greater_is_better else min)(scored, key=lambda row: row[metric])
    return Outcome(best[metric], best["epoch"], rows[-1].get(metric))


# -- trackers ---------------------------------------------------------------------------------------------------------

# variable -> its value for the folder of all logs; trackers that are not listed write nothing there
VARIABLES = {
    "TENSORBOARD_LOGGING_DIR": "{logs}/tensorboard",
    "WANDB_DIR": "{logs}",  # it adds `wandb` itself
    "MLFLOW_TRACKING_URI": "sqlite:///{logs}/mlflow.db",
    "TRACKIO_DIR": "{logs}/trackio",  # read once a process
    "COMET_OFFLINE_DIRECTORY": "{logs}/comet",
    "SWANLAB_LOG_DIR": "{logs}/swanlab",
}


@contextmanager
def logging_to(logs: Path, named: Sequence[str]) -> Iterator[None]:
    """Make the named trackers write to a folder while the body runs."""
    places = {name: place.format(logs=logs.absolute()) for name, place in VARIABLES.items()} if named else {}
    added = {name: place for name, place in places.items() if name not in os.environ}
    os.environ.update(added)
    before = _mlflow_run()
    try:
        yield
    finally:
        if before is None and _mlflow_run() is not None:
            sys.modules["mlflow"].end_run()  # else it ends with the process, and is looked for elsewhere
        for name in added:
            os.environ.pop(name, None)


def _mlflow_run() -> Any:
    """Return the run that MLflow is logging to, or None."""
    return sys.modules["mlflow"].active_run() if "mlflow" in sys.modules else None


def trackers(named: Sequence[str], logs: Path) -> list[TrainerCallback]:
    """Return the callbacks of these trackers; this call and the training have to be inside `logging_to`."""
    callbacks: list[TrainerCallback] = [_Folder(logs)] if named else []
    for kind in get_reporting_integration_callbacks(list(named)):
        if kind is CodeCarbonCallback:
            callbacks.append(_CodeCarbon(logs))
        elif kind is DVCLiveCallback:
            live = import_module("dvclive").Live
            callbacks.append(
                DVCLiveCallback(live=live(dir=str(logs / "dvclive"), dvcyaml=str(logs / "dvc.yaml")))
            )
        else:
            callbacks.append(kind())
    return callbacks


class _Folder(TrainerCallback):
    """Callback that creates the folder of logs when training begins, after a new run has emptied its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(self, args: Any, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        """Make the folder."""
        if state.is_local_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)


class _CodeCarbon(CodeCarbonCallback):
    """CodeCarbon's tracker, whose files transformers puts into the folder of the checkpoints."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_init_end(self, args: TrainingArguments, *others: Any, **kwargs: Any) -> None:
        """Create the tracker for the folder of logs, which has to exist."""
        self.folder.mkdir(parents=True, exist_ok=True)
        moved = copy.copy(args)
        moved.output_dir = str(self.folder)
        super().on_init_end(moved, *others, **kwargs)
