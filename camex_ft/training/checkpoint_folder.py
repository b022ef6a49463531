"""Checkpoint folders: their files, their manifest, and the choice of the newest one that is whole.

A manifest lists the files of a checkpoint with their sizes and SHA-256, and the versions that wrote them. A folder that
disagrees with its manifest is never resumed from.
"""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from camex_ft.utils import logs
from camex_ft.utils.durable import open_regular, remove
from camex_ft.utils.errors import UserError
from camex_ft.utils.folders import read_json, unsafe

STATE = "trainer_state.json"
# Optimizer, schedule, gradient scaler; and of each process its random state and its running sums (`state_files`).
OPTIMIZER, SCHEDULE, SCALER = (
    "state/optimizer.safetensors",
    "state/schedule.safetensors",
    "state/scaler.safetensors",
)
RANDOM, TRAINING = "state/random-{}.safetensors", "state/training-{}.safetensors"
NEEDED = ("config.json", OPTIMIZER, SCHEDULE, RANDOM.format(0), TRAINING.format(0))
DEEPSPEED = "latest"  # names the folder with DeepSpeed's own model, optimizer and schedule
PICKLES = ("*.bin", "*.pt", "*.pth")  # transformers' own files for the same

MANIFEST = "manifest.json"
FORMAT = 1  # of a checkpoint's folder; higher where an older version would read it wrongly
PACKAGES = ("camex_ft", "torch", "transformers")

Count = Annotated[int, Field(ge=0, le=logs.MOST)]


class CallbackState(BaseModel):
    """State of a callback, in the form of `transformers.trainer_callback.ExportableState`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    args: dict[str, Any]
    attributes: dict[str, Any]


class ResumableState(BaseModel):
    """The fields of `transformers.TrainerState` that a run resumes from, with their types."""

    model_config = ConfigDict(strict=True, extra="allow")  # TrainerState itself rejects unknown fields

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


# -- names and facts --------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders in `folder`, newest first, whole or not."""
    steps = [
        (int(path.name.rpartition("-")[2]), path)
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdigit()
    ]
    return [path for _, path in sorted(steps, reverse=True)]


def name_of(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def state_of(checkpoint: Path) -> TrainerState:
    """Return the Trainer's state in a checkpoint."""
    return TrainerState.load_from_json(str(checkpoint / STATE))


def ended(state: TrainerState) -> bool:
    """Return whether training is over in a state: all steps are done, or a callback stopped it."""
    control = cast(dict[str, Any], state.stateful_callbacks or {}).get("TrainerControl") or {}
    return state.global_step >= state.max_steps or bool(control.get("args", {}).get("should_training_stop"))


def of_deepspeed(checkpoint: Path) -> bool:
    """Return whether DeepSpeed wrote a checkpoint, which only the same number of processes can load."""
    return (checkpoint / DEEPSPEED).is_file()


def processes(checkpoint: Path) -> int:
    """Return the number of processes that wrote a checkpoint, each of which has a random state."""
    return max(len(list(checkpoint.glob(RANDOM.format("*")))), 1)


def rows_at_once(checkpoint: Path) -> int:
    """Return the rows of one forward pass over all processes, in the run that wrote a checkpoint."""
    return int(state_of(checkpoint).train_batch_size or 0) * processes(checkpoint)


def pickles(checkpoint: Path) -> list[str]:
    """Return the names of pickles in a checkpoint, which transformers would load; DeepSpeed's are its own affair."""
    if of_deepspeed(checkpoint):
        return []
    return sorted(path.name for pattern in PICKLES for path in checkpoint.glob(pattern))


# -- manifest ---------------------------------------------------------------------------------------------------------


def write_manifest(checkpoint: Path, *, extra: bool = False) -> None:
    """Write the manifest of a complete checkpoint.

    Args:
        checkpoint: folder of the checkpoint.
        extra: the checkpoint was written because of a signal, at a step without a regular one.
    """
    files = {
        name: {"size": path.stat().st_size, "sha256": digest(path)}
        for name, path in _files(checkpoint).items()
    }
    content = {"format": FORMAT, "extra": extra, "versions": versions(), "files": files}
    (checkpoint / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint; empty if it is missing or cannot be read."""
    try:
        content = read_json(checkpoint / MANIFEST)
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        return {}
    files, by = content.get("files"), content.get("versions", {})
    valid = isinstance(files, dict) and all(isinstance(entry, dict) for entry in files.values())
    return content if valid and isinstance(by, dict) else {}


def is_extra(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written because of a signal, at a step without a regular one."""
    return bool(read_manifest(checkpoint).get("extra"))


def versions() -> dict[str, str]:
    """Return the versions of the packages that write a checkpoint."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:  # run from its sources
            installed[name] = "unknown"
    return installed


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open_regular(path) as file:
        sha256 = hashlib.sha256()
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def identity(checkpoint: Path) -> str:
    """Return the SHA-256 of a checkpoint's manifest, which lists those of all files; without one, of its path."""
    path = checkpoint / MANIFEST
    return digest(path) if path.is_file() else hashlib.sha256(os.fsencode(checkpoint.resolve())).hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    """Return all files of a folder by name, without the manifest; links count as files."""
    files = {}
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in [*names, *links]:
            path = Path(parent) / name
            files[path.relative_to(folder).as_posix()] = path
    files.pop(MANIFEST, None)
    return files


# -- faults -----------------------------------------------------------------------------------------------------------


def fault(checkpoint: Path) -> str | None:
    """Return the fault of a checkpoint folder that names and sizes of its files show, or None."""
    wrong = unsafe(checkpoint, weights=False) or _manifest_fault(checkpoint)
    if wrong is not None:
        return wrong
    for name in (STATE, *(("config.json",) if of_deepspeed(checkpoint) else NEEDED)):
        if not (checkpoint / name).is_file():
            return f"it has no {name}"
    if not any(checkpoint.glob("*.safetensors")):
        return "it has no weights (*.safetensors)"
    if names := pickles(checkpoint):
        return f"it holds {names[0]}, a pickle, which no run writes or reads"
    return None


def damage(checkpoint: Path) -> str | None:
    """Return the fault of a checkpoint that its contents, or those of the best one so far, show, or None."""
    wrong = fault(checkpoint) or _content_fault(checkpoint)
    if wrong is not None:
        return wrong
    wrong = _state_fault(checkpoint)
    if wrong is not None:
        return f"its {STATE} {wrong}"
    recorded = state_of(checkpoint).best_model_checkpoint
    best = checkpoint.parent / Path(recorded).name if recorded else checkpoint
    if best == checkpoint or not best.is_dir():
        return None
    wrong = fault(best) or _content_fault(best)
    return None if wrong is None else f"the best one so far, {best.name}, is needed with it: {wrong}"


def _manifest_fault(checkpoint: Path) -> str | None:
    """Return the first difference of a folder's names and sizes from its manifest, or None."""
    manifest = read_manifest(checkpoint)
    if not manifest:
        return (
            f"it has no {MANIFEST} that can be read: it was cut short, or another program or version wrote it"
        )
    if manifest["format"] > FORMAT:
        by = manifest.get("versions", {}).get("camex_ft", "unknown")
        return (
            f"it is of format {manifest['format']}, from camex_ft {by}, and this version reads up to {FORMAT}"
        )
    files, listed = _files(checkpoint), manifest["files"]
    for name in listed:
        if name not in files:
            return f"it has no {name}"
        size = files[name].stat().st_size
        if size != listed[name].get("size"):
            return f"its {name} cannot be read: it has {size} bytes and was written with {listed[name].get('size')}"
    more = sorted(files.keys() - listed.keys())
    return f"its {more[0]} is not in its manifest" if more else None


def _content_fault(checkpoint: Path) -> str | None:
    """Return the first file whose content is not the one in the manifest, or None; all files are read."""
    for name, entry in read_manifest(checkpoint)["files"].items():
        try:
            content = digest(checkpoint / name)
        except OSError as error:
            return f"its {name} cannot be read: {error.strerror or error}"
        if content != entry.get("sha256"):
            return f"its {name} is damaged: its SHA-256 is not the one that was written"
    return None


def _state_fault(checkpoint: Path) -> str | None:
    """Return the reason why no run could resume from the Trainer's state, or None."""
    try:
        state = ResumableState.model_validate(read_json(checkpoint / STATE))
        state_of(checkpoint)
    except ValidationError as error:
        first = error.errors()[0]
        return f"has a wrong {'.'.join(map(str, first['loc'])) or 'form'}: {first['msg']}"
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return f"cannot be read: {type(error).__name__}: {error}"
    for number, entry in enumerate(state.log_history):
        if wrong := logs.fault(entry):
            return f"has a wrong entry {number} in its log_history: {wrong}"
    if checkpoint.name.startswith(PREFIX_CHECKPOINT_DIR) and checkpoint.name != name_of(state.global_step):
        return f"is of step {state.global_step}, and the folder is called {checkpoint.name}"
    return None


# -- choice and rotation ----------------------------------------------------------------------------------------------


def choose(resume: str, folder: Path) -> tuple[Path | None, list[str]]:
    """Return the checkpoint that ``training.resume`` asks for, or None to start anew, and notes on skipped ones.

    Raises:
        UserError: it names a checkpoint that does not exist or is not whole.
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


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint, or None, and a note on each newer one that is not whole."""
    notes: list[str] = []
    for path in checkpoints(folder):
        wrong = damage(path)
        if wrong is None:
            return path, notes
        notes.append(f"{path.name} is passed over: {wrong}")
    return None, notes


def rotate(folder: Path, *, newest: Path, limit: int | None, best: str | None) -> None:
    """Remove old checkpoints, now that `newest` is whole: the oldest of more than `limit`.

    The best one stays. Extra ones, written because of a signal, go whatever the limit is. With a limit of 1 the newest
    stays beside the best, to resume from.
    """
    stay = {newest.name, *([Path(best).name] if best else [])}
    others = [path for path in checkpoints(folder) if path.name not in stay]
    gone = [path for path in others if is_extra(path)]
    if limit is not None and limit > 0:
        regular = [path for path in others if path not in gone]
        before = [path for path in regular if step_of(path) < step_of(newest)]
        later = [path for path in regular if path not in before]  # of an earlier attempt
        gone += later + before[max(limit - len(stay), 0) :]
    for path in gone:
        remove(path)
