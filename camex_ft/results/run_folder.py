"""Run folders ``<output>/runs/<name>/``: config.yaml, history.jsonl, logs, checkpoints and, last, record.json."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from camex_ft.config.backbones import NEW
from camex_ft.config.identity import folder_label
from camex_ft.results.provenance import command_line
from camex_ft.results.record import Record, dumps, load_record
from camex_ft.utils.durable import UNFINISHED, open_regular, remove, sweep, sync, write_atomically
from camex_ft.utils.errors import UserError, is_full, reason_full
from camex_ft.utils.logs import read_lines

LOCK, OWNER = ".lock", ".owner.json"  # held by the process that runs here; who that is, for people
PATIENCE = 10.0  # seconds; data loaders look for their parent every 5
LONGEST = 50  # characters of each of a name's four parts: a file system takes 255 in all
CLOSING = "train_loss"  # what the line at the end of a training has


class InUse(UserError):
    """Another process runs in the folder of a run."""


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
    return re.sub(r"-{2,}", "-", re.sub(r"[^A-Za-z0-9._-]+", "-", text)).strip("-.")[:LONGEST]


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

    @property
    def logs(self) -> Path:
        """The folder of what trackers such as TensorBoard write; it stays when the run is done."""
        return self.path / "logs"

    def own(self, *names: str) -> Path:
        """Return a place in this folder for what a command adds to a run; `UserError` where a link leads elsewhere."""
        path = self.path
        for name in names:
            path = path / name
            if path.is_symlink():
                raise UserError(
                    f"{path} is a link, and files would be written where it leads. Remove it, or name another place "
                    "with --out"
                )
        return path

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from running here while the body does, and remove what they left unfinished.

        The kernel frees the lock when this process ends, by whatever signal. Over NFS it holds between machines where
        the file system is mounted with locks, which is the default.

        Raises:
            InUse: another process runs here.
            UserError: something here is not what a run can write to: see `_check_entries`.
        """
        self._check_entries()
        lock = FileLock(self.path / LOCK)
        try:
            # the lock of a run that was killed lasts as long as processes that it had started, such as data loaders
            lock.acquire(timeout=PATIENCE if self._owner_is_gone() else 0)
        except Timeout:
            raise InUse(self._in_use()) from None
        except OSError as error:  # not a file, or of another user
            raise UserError(
                f"output.dir: {self.path / LOCK} cannot be locked: {error.strerror or error}. Remove it where no other "
                "run is under way there"
            ) from error
        try:
            owner = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "command": command_line(),
            }
            write_atomically(self.path / OWNER, json.dumps(owner) + "\n")
            sweep(self.path)
            sweep(self.checkpoints)
            yield
        finally:
            (self.path / OWNER).unlink(missing_ok=True)
            if self.record.exists():  # nobody waits for it: a run that is done is shown
                (self.path / LOCK).unlink(missing_ok=True)
            lock.release()

    def _check_entries(self) -> None:
        """Raise `UserError` where a name of the run's is a link, whose target would be changed, or of another kind."""
        for path in (self.path, *self.path.iterdir()):
            if path.is_symlink():
                raise UserError(
                    f"output.dir: {path} is a link, and a run writes and removes files in its own folder alone: "
                    "expected what it leads to in its place. To keep runs on another disk: output.dir=FOLDER-ON-IT"
                )
            files = (self.record.name, self.config.name, self.history.name, LOCK, OWNER)
            expected = "file" if path.name in files else "folder" if path == self.checkpoints else ""
            if expected and path.is_dir() != (expected == "folder"):
                raise UserError(f"output.dir: {path} is no {expected}: expected one, or nothing of that name")

    def _owner(self) -> dict[str, Any]:
        try:
            with open_regular(self.path / OWNER) as file:
                found = json.loads(file.read())
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _owner_is_gone(self) -> bool:
        owner = self._owner()
        if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
            return False
        try:
            os.kill(owner["pid"], 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):  # it is another user's, or no number of a process
            return False
        return False

    def _in_use(self) -> str:
        owner = self._owner()
        who = "another process"
        if owner:
            who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('started')}"
        command = f": {owner['command']}" if owner.get("command") else ""
        return (
            f"output.dir: this run is under way already, by {who}{command}\nIts folder is {self.path}. Wait for it, or "
            "end it: the same command then goes on from its last checkpoint; expected one process a run"
        )

    def clear(self) -> None:
        """Remove whatever an earlier run left, so that a new one starts from nothing; its record goes first."""
        self.record.unlink(missing_ok=True)
        for entry in self.path.iterdir():
            if entry.name in (LOCK, OWNER):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def remove_if_empty(self) -> None:
        """Remove the folder, and the one that holds it, where nothing is in them but what says who runs here."""
        with contextlib.suppress(OSError):
            if {entry.name for entry in self.path.iterdir()} <= {LOCK, OWNER}:
                for name in (OWNER, LOCK):
                    (self.path / name).unlink(missing_ok=True)
        for path in (self.path, self.path.parent):
            with contextlib.suppress(OSError):
                path.rmdir()

    def drop_checkpoints(self) -> None:
        """Remove the checkpoints: what they serve, going on with the run, is over."""
        with contextlib.suppress(OSError):  # what cannot be removed harms nobody
            remove(self.checkpoints)

    def tidy(self) -> None:
        """Remove what a run left that was killed between its record and its end, where no other one is under way."""
        known = {LOCK, OWNER, self.checkpoints.name}
        if any(p.name in known or p.name.endswith(UNFINISHED) for p in self.path.iterdir()):
            with contextlib.suppress(UserError, OSError), self.alone():
                self.drop_checkpoints()

    def write_config(self, text: str) -> None:
        """Write config.yaml."""
        write_atomically(self.config, text)

    def append_history(self, entry: dict[str, Any]) -> None:
        """Append one line to history.jsonl."""
        with self.history.open("a", encoding="utf-8") as file:
            file.write(dumps(entry) + "\n")

    def sync_history(self) -> None:
        """Bring history.jsonl to the disk: a checkpoint counts on its lines."""
        if self.history.exists():
            sync(self.history)

    def rewind_history(self, step: int) -> None:
        """Drop what a run resumed from `step` writes again: the lines after it, and from the closing one on, which is
        followed by the final evaluations; and a line that was cut short."""
        if self.history.exists():
            entries = self.read_history()
            again = (n for n, entry in enumerate(entries) if entry["step"] > step or CLOSING in entry)
            kept = entries[: next(again, len(entries))]
            write_atomically(self.history, "".join(dumps(entry) + "\n" for entry in kept))

    def read_history(self) -> list[dict[str, Any]]:
        """Return the lines of history.jsonl that can be read: see `camex_ft.utils.logs`."""
        return read_lines(self.history)

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


@contextmanager
def full_disk(folder: str) -> Iterator[None]:
    """Make an error of a full disk a `UserError`.

    Args:
        folder: where results go: ``output.dir``.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise UserError(
            f"output.dir: there is no room left to write in '{folder}': {reason_full(error)}. "
            "Make room: the same command goes on from the last checkpoint. training.save_total_limit=1 keeps fewer "
            "checkpoints, output.model=false no model"
        ) from error
