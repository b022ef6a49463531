"""Checkpoints of a run: which is the newest that is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from camex_ft.training import manifest
from camex_ft.utils import logs
from camex_ft.utils.durable import remove
from camex_ft.utils.errors import UserError
from camex_ft.utils.folders import read_json, unsafe

STATE = "trainer_state.json"
# States of everything that goes on beside the model (`stored`), and those of each process.
OPTIMIZER, SCHEDULE, SCALER = (
    "state/optimizer.safetensors",
    "state/schedule.safetensors",
    "state/scaler.safetensors",
)
RANDOM, TRAINING = "state/random-{}.safetensors", "state/training-{}.safetensors"
NEEDED = ("config.json", OPTIMIZER, SCHEDULE, RANDOM.format(0), TRAINING.format(0))
DEEPSPEED = "latest"  # names the folder in which DeepSpeed keeps model, optimizer and schedule
Count = Annotated[int, Field(ge=0, le=logs.MOST)]


class CallbackState(BaseModel):
    """State of a callback, as `transformers.trainer_callback.ExportableState` has it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    args: dict[str, Any]
    attributes: dict[str, Any]


class State(BaseModel):
    """The fields of `transformers.TrainerState` that a run goes on from, in the types that it has them."""

    model_config = ConfigDict(
        strict=True, extra="allow"
    )  # of others TrainerState itself says what it does not know

    epoch: Annotated[float, Field(ge=0, le=logs.MOST)] | None = None
    global_step: Count
    max_steps: Annotated[int, Field(ge=-1, le=logs.MOST)] = 0
    train_batch_size: Count | None = None
    num_input_tokens_seen: Count = 0
    total_flos: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0
    log_history: list[dict[str, Any]] = []
    best_metric: float | None = None
    best_global_step: Count | None = None
    best_model_checkpoint: str | None = None
    stateful_callbacks: dict[str, CallbackState | list[CallbackState]] = {}


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders in `folder`, newest first, whole or not."""
    found = [
        (int(path.name.rpartition("-")[2]), path)
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdigit()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def name_of(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def random_file(process: int) -> str:
    """Return the name of the file with a process's random state."""
    return RANDOM.format(process)


def training_file(process: int) -> str:
    """Return the name of the file with what a process had summed up since the last log line."""
    return TRAINING.format(process)


def is_extra(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written because the run was stopped, at a step that asks for none."""
    return bool(manifest.read(checkpoint).get("extra"))


def state_of(checkpoint: Path) -> TrainerState:
    """Return the Trainer's state that a checkpoint holds."""
    return TrainerState.load_from_json(str(checkpoint / STATE))


def ended(state: TrainerState) -> bool:
    """Return whether training had come to its end in a state: by its steps, or because a callback ended it."""
    control = cast(dict[str, Any], state.stateful_callbacks or {}).get("TrainerControl") or {}
    return state.global_step >= state.max_steps or bool(control.get("args", {}).get("should_training_stop"))


def of_deepspeed(checkpoint: Path) -> bool:
    """Return whether DeepSpeed wrote a checkpoint, which as many processes alone can load."""
    return (checkpoint / DEEPSPEED).is_file()


def processes(checkpoint: Path) -> int:
    """Return how many processes wrote a checkpoint: each writes the state of its own randomness."""
    return max(len(list(checkpoint.glob(RANDOM.format("*")))), 1)


def rows_at_once(checkpoint: Path) -> int:
    """Return how many rows one forward pass took over all processes, of the run that wrote a checkpoint."""
    return int(state_of(checkpoint).train_batch_size or 0) * processes(checkpoint)


def fault(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, as far as names and sizes tell, or None."""
    wrong = unsafe(checkpoint, weights=False) or manifest.fault(checkpoint)
    if wrong is not None:
        return wrong
    for name in (STATE, *(("config.json",) if of_deepspeed(checkpoint) else NEEDED)):
        if not (checkpoint / name).is_file():
            return f"it has no {name}"
    if not any(checkpoint.glob("*.safetensors")):
        return "it has no weights (*.safetensors)"
    if not of_deepspeed(checkpoint) and any(checkpoint.glob("*.bin")):
        return "it holds weights as pickle, which no run writes and none reads"
    return None


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, its contents and those of the best one so far, or None."""
    wrong = fault(checkpoint) or manifest.damage(checkpoint)
    if wrong is not None:
        return wrong
    wrong = _state_fault(checkpoint)
    if wrong is not None:
        return f"its {STATE} {wrong}"
    kept = state_of(checkpoint).best_model_checkpoint
    best_name = Path(kept).name if kept else ""
    best = checkpoint.parent / best_name if best_name else checkpoint
    if best == checkpoint or not best.is_dir():
        return None
    wrong = fault(best) or manifest.damage(best)
    return None if wrong is None else f"the best one so far, {best.name}, is needed with it: {wrong}"


def _state_fault(checkpoint: Path) -> str | None:
    """Return what in the Trainer's state no run could go on from, or None."""
    try:
        found = State.model_validate(read_json(checkpoint / STATE))
        state_of(checkpoint)
    except ValidationError as error:
        first = error.errors()[0]
        return f"has a wrong {'.'.join(map(str, first['loc'])) or 'form'}: {first['msg']}"
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return f"cannot be read: {type(error).__name__}: {error}"
    for number, entry in enumerate(found.log_history):
        if wrong := logs.fault(entry):
            return f"has a wrong entry {number} in its log_history: {wrong}"
    if checkpoint.name.startswith(PREFIX_CHECKPOINT_DIR) and checkpoint.name != name_of(found.global_step):
        return f"is of step {found.global_step}, and the folder is called {checkpoint.name}"
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint, or None, and what to tell of those that were passed over."""
    skipped: list[str] = []
    for path in checkpoints(folder):
        wrong = damage(path)
        if wrong is None:
            return path, skipped
        skipped.append(f"{path.name} is passed over: {wrong}")
    return None, skipped


def rotate(folder: Path, *, newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the checkpoints that are not to be kept, now that `newest` is whole: the oldest of more than `limit`.

    The best one stays, and one that was written because the run was stopped goes, whatever the limit is. With a limit
    of 1 the newest stays beside the best, to go on from.
    """
    kept = {newest.name, *([Path(best).name] if best else [])}
    others = [path for path in checkpoints(folder) if path.name not in kept]
    gone = [path for path in others if is_extra(path)]
    if limit is not None and limit > 0:
        before = [path for path in others if path not in gone and step_of(path) < step_of(newest)]
        # those of a later step are of an attempt that was given up
        later = [path for path in others if path not in gone and path not in before]
        gone += later + before[max(limit - len(kept), 0) :]
    for path in gone:
        remove(path)


def choose(resume: str, folder: Path) -> tuple[Path | None, list[str]]:
    """Return the checkpoint that ``training.resume`` asks for, or None to start anew, and notes on others.

    Raises:
        UserError: it names a checkpoint that is not there or not whole.
    """
    if resume == "never":
        return None, []
    if resume == "auto":
        return newest(folder)
    path = Path(resume).expanduser()
    if not path.is_dir():
        raise UserError(
            f"training.resume: no checkpoint folder at {resume}; expected auto, never or a folder"
        )
    wrong = damage(path)
    if wrong is not None:
        raise UserError(f"training.resume: {resume} cannot be resumed from: {wrong}")
    return path, []
