"""One folder a run, ``<output>/runs/<name>/``: config.yaml, history.jsonl, checkpoints and, last, record.json."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camex_ft.config.backbones import NEW
from camex_ft.config.identity import folder_label
from camex_ft.errors import UserError
from camex_ft.results.record import Record, dumps, load_record


def run_name(*, suite: str, task: str, backbone: str, protocol: str, seed: int, hash8: str) -> str:
    """Return ``<suite>--<task>--<backbone>--<protocol>--seed<k>--<hash8>``; each part is safe as a file's name.

    Of a backbone that is an absolute path only the last part is used; its hash tells namesakes apart. The model of
    another run is called by that run's hash.
    """
    path = backbone.removeprefix(NEW)
    label = folder_label(path)
    local = os.path.isabs(path) or label.startswith("run-")
    short = backbone.removesuffix(path) + label if local else backbone
    parts = (suite, task, short, protocol)
    return "--".join([*map(_slug, parts), f"seed{seed}", hash8])


def _slug(text: str) -> str:
    text = re.sub(r"^(new:)?package:", r"\1", text)
    return re.sub(r"-{2,}", "-", re.sub(r"[^A-Za-z0-9._-]+", "-", text)).strip("-.")


@dataclass(frozen=True)
class RunFolder:
    """The files of one run. Make it with `RunFolder.create`, which makes sure that it can be written."""

    path: Path

    @classmethod
    def create(cls, output: Path | str, name: str) -> RunFolder:
        """Make ``<output>/runs/<name>`` if need be; `UserError` if it cannot be written."""
        folder = cls(Path(output) / "runs" / name)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder.path):
                pass
        except OSError as error:
            raise UserError(
                f"output.dir: '{output}' cannot be written: {error.strerror or error} ({folder.path}). "
                "Name another folder, for example output.dir=results"
            ) from error
        return folder

    @property
    def record(self) -> Path:
        """record.json: there only when the run has ended."""
        return self.path / "record.json"

    @property
    def config(self) -> Path:
        """config.yaml: the resolved configuration."""
        return self.path / "config.yaml"

    @property
    def history(self) -> Path:
        """history.jsonl: one line a logging step."""
        return self.path / "history.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of the Trainer's checkpoints."""
        return self.path / "checkpoints"

    def clear(self) -> None:
        """Remove whatever an earlier run left, so that a new one starts from nothing."""
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def remove_if_empty(self) -> None:
        """Remove the folder, and the one that holds it, where nothing is in them."""
        for path in (self.path, self.path.parent):
            with contextlib.suppress(OSError):
                path.rmdir()

    def drop_checkpoints(self) -> None:
        """Remove the checkpoints: what they serve, going on with the run, is over."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def write_config(self, text: str) -> None:
        """Write config.yaml."""
        write_atomically(self.config, text)

    def append_history(self, entry: dict[str, Any]) -> None:
        """Append one line to history.jsonl."""
        with self.history.open("a", encoding="utf-8") as file:
            file.write(dumps(entry) + "\n")

    def rewind_history(self, step: int) -> None:
        """Drop the lines after `step`, which a run resumed from there writes again, and a line that was cut short."""
        if self.history.exists():
            kept = [entry for entry in self.read_history() if entry.get("step", 0) <= step]
            write_atomically(self.history, "".join(dumps(entry) + "\n" for entry in kept))

    def read_history(self) -> list[dict[str, Any]]:
        """Return the lines of history.jsonl, without one that a killed run cut short."""
        entries = []
        for line in self.history.read_text(encoding="utf-8").splitlines() if self.history.exists() else []:
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return entries

    def write_record(self, record: Record) -> None:
        """Write record.json, whole or not at all."""
        write_atomically(self.record, record.to_json())


def find_done(folder: RunFolder | Path | str) -> Record | None:
    """Return the record of a run that came to its end, or None; a broken or foreign record counts as none."""
    try:
        record = load_record(folder.path if isinstance(folder, RunFolder) else folder)
    except UserError:
        return None
    return record if record.run.status == "done" else None


def write_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it into place: a reader sees the old file or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
