"""Trackers of `training.report_to`: TensorBoard, Weights & Biases and the like write below the run's folder ``logs``.

Most of them are told by a variable of the environment where their files go, and some read it only when they begin to
log. What the user has set stays.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import CodeCarbonCallback, DVCLiveCallback, get_reporting_integration_callbacks

# variable -> what it holds, of the folder of all logs; trackers that are left out write nothing here
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
    """Let trackers write to a folder while the body runs: to that folder, where any are named."""
    places = {name: place.format(logs=logs.absolute()) for name, place in VARIABLES.items()} if named else {}
    wanted = {name: place for name, place in places.items() if name not in os.environ}
    os.environ.update(wanted)
    before = _mlflow_run()
    try:
        yield
    finally:
        if before is None and _mlflow_run() is not None:
            sys.modules["mlflow"].end_run()  # else it ends with the process, and is looked for elsewhere
        for name in wanted:
            os.environ.pop(name, None)


def _mlflow_run() -> Any:
    """Return the run that MLflow is logging to, or None."""
    return sys.modules["mlflow"].active_run() if "mlflow" in sys.modules else None


def trackers(named: Sequence[str], logs: Path) -> list[TrainerCallback]:
    """Return the callbacks of these trackers, which `logging_to` has to surround as well as the training."""
    made: list[TrainerCallback] = [_Folder(logs)] if named else []
    for kind in get_reporting_integration_callbacks(list(named)):
        if kind is CodeCarbonCallback:
            made.append(_CodeCarbon(logs))
        elif kind is DVCLiveCallback:
            made.append(_dvclive(logs))
        else:
            made.append(kind())
    return made


class _Folder(TrainerCallback):
    """Makes the folder of logs when training begins: before that, a run that starts anew empties its own folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the folder."""
        if state.is_local_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)


class _CodeCarbon(CodeCarbonCallback):
    """CodeCarbon's tracker, which transformers lets write to the folder of the checkpoints."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the tracker, for the folder of logs, which has to be there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        moved = copy.copy(args)
        moved.output_dir = str(self.folder)
        super().on_init_end(moved, state, control, **kwargs)


def _dvclive(folder: Path) -> TrainerCallback:
    live = import_module("dvclive").Live
    return DVCLiveCallback(live=live(dir=str(folder / "dvclive"), dvcyaml=str(folder / "dvc.yaml")))
