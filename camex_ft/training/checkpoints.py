"""Checkpoints of a run: which is the newest that is whole."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from camex_ft.errors import UserError

# the Trainer writes its state last
STATE, NEEDED = "trainer_state.json", ("config.json", "optimizer.pt", "scheduler.pt")
DEEPSPEED = "latest"  # names the folder in which DeepSpeed keeps model, optimizer and schedule


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders in `folder`, newest first, whole or not."""
    found = [
        (int(path.name.rpartition("-")[2]), path)
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdigit()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def state_of(checkpoint: Path) -> TrainerState:
    """Return the Trainer's state that a checkpoint holds."""
    return TrainerState.load_from_json(str(checkpoint / STATE))


def of_deepspeed(checkpoint: Path) -> bool:
    """Whether DeepSpeed wrote a checkpoint, which as many processes alone can load."""
    return (checkpoint / DEEPSPEED).is_file()


def processes(checkpoint: Path) -> int:
    """Return how many processes wrote a checkpoint: each writes the state of its own randomness."""
    return max(len(list(checkpoint.glob("rng_state*.pth"))), 1)


def rows_at_once(checkpoint: Path) -> int:
    """Return how many rows one forward pass took over all processes, of the run that wrote a checkpoint."""
    return int(state_of(checkpoint).train_batch_size or 0) * processes(checkpoint)


def fault(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, or None where it is whole."""
    for name in (STATE, *(("config.json",) if of_deepspeed(checkpoint) else NEEDED)):
        if not (checkpoint / name).is_file():
            return f"it has no {name}"
    try:
        json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except ValueError:
        return f"its {STATE} is not JSON"
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights:
        return "it has no weights (*.safetensors)"
    for file in weights:
        try:
            with safe_open(file, "pt"):  # checks the header against the file's length
                pass
        except (SafetensorError, OSError) as error:
            return f"its {file.name} cannot be read: {error}"
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint, or None, and what to tell of those that were passed over."""
    skipped: list[str] = []
    for path in checkpoints(folder):
        wrong = fault(path)
        if wrong is None:
            return path, skipped
        skipped.append(f"{path.name} is passed over: {wrong}")
    return None, skipped


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
    wrong = fault(path)
    if wrong is not None:
        raise UserError(f"training.resume: {resume} cannot be resumed from: {wrong}")
    return path, []
