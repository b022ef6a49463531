"""Run folders ``<output>/runs/<name>/``: config.yaml, history.jsonl, logs, checkpoints and, last, record.json.

They are found again by the hash in their name: of settings, data and backbone content.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from camex_ft.config import Config, config_hash, load_config
from camex_ft.config.backbones import NEW
from camex_ft.config.identity import folder_label, hash_by_name
from camex_ft.results.provenance import command_line
from camex_ft.results.record import Record, dumps, load_record
from camex_ft.utils.durable import UNFINISHED, open_regular, remove, sweep, sync, write_atomically
from camex_ft.utils.errors import UserError, is_full, reason_full
from camex_ft.utils.logs import read_lines

LOCK, OWNER = ".lock", ".owner.json"  # the lock of the process that runs here, and a description of it
PATIENCE = 10.0  # seconds; data loaders check for their parent every 5
LONGEST = 50  # characters of each of a name's four parts: a file system takes 255 in all
CLOSING = "train_loss"  # key of the line at the end of a training
SHOWN = 12  # digits of a SHA-256
HASH = re.compile(r".*--[0-9a-f]{8}")  # of a run folder's name


class InUse(UserError):
    """Another process runs in the folder of a run."""


def run_name(*, suite: str, task: str, backbone: str, protocol: str, seed: int, hash8: str) -> str:
    """Return ``<suite>--<task>--<backbone>--<protocol>--seed<k>--<hash8>``; each part is safe as a file's name.

    An absolute path of a backbone is shortened to its last part; the hash tells namesakes apart. The model of another
    run is named by that run's hash.
    """
    path = backbone.removeprefix(NEW)
    label = folder_label(path)
    local = os.path.isabs(path) or label.startswith("run-")
    short = backbone.removesuffix(path) + label if local else backbone
    texts = (re.sub(r"^(new:)?package:", r"\1", text) for text in (suite, task, short, protocol))
    parts = [re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[:LONGEST] for text in texts]
    return "--".join([*parts, f"seed{seed}", hash8])


@dataclass
class RunFolder:
    """The files of one run. `RunFolder.create` makes the folder and checks that it can be written."""

    path: Path

    def __post_init__(self) -> None:
        self.record = self.path / "record.json"  # written at the end of the run
        self.config = self.path / "config.yaml"  # the resolved configuration
        self.history = self.path / "history.jsonl"  # one line a logging step
        self.checkpoints = self.path / "checkpoints"  # of the Trainer
        self.logs = self.path / "logs"  # of trackers such as TensorBoard; it stays when the run is done

    @classmethod
    def create(cls, output: Path | str, name: str) -> RunFolder:
        """Make ``<output>/runs/<name>`` if needed; `UserError` if it cannot be written."""
        folder = cls(Path(output) / "runs" / name)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder.path):
                pass
        except OSError as error:
            raise UserError(
                f"output.dir: '{output}' cannot be written: {error.strerror or error} ({folder.path}). "
                "Set another folder, for example output.dir=results"
            ) from error
        return folder

    def own(self, *names: str) -> Path:
        """Return a path in this folder for the output of a command; `UserError` if a part of it is a link."""
        path = self.path
        for name in names:
            path = path / name
            if path.is_symlink():
                raise UserError(
                    f"{path} is a link: files would be written to its target. Remove it, or set another folder "
                    "with --out"
                )
        return path

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the folder while the body runs, and remove unfinished files of other processes.

        The kernel frees the lock when this process ends, by any signal. Over NFS it holds between machines if the file
        system is mounted with locks, which is the default.

        Raises:
            InUse: another process runs here.
            UserError: a link or an unexpected kind of file is in the way: see `_check_entries`.
        """
        self._check_entries()
        lock = FileLock(self.path / LOCK)
        try:
            # the lock of a killed run lasts as long as the processes that it started, such as data loaders
            lock.acquire(timeout=PATIENCE if self._owner_is_gone() else 0)
        except Timeout:
            raise InUse(self._in_use()) from None
        except OSError as error:  # not a file, or of another user
            raise UserError(
                f"output.dir: {self.path / LOCK} cannot be locked: {error.strerror or error}. Remove it if no other "
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
            if self.record.exists():  # a finished run needs no lock
                (self.path / LOCK).unlink(missing_ok=True)
            lock.release()

    def _check_entries(self) -> None:
        """Raise `UserError` if one of the run's files is a link, or a folder in place of a file or the reverse."""
        for path in (self.path, *self.path.iterdir()):
            if path.is_symlink():
                raise UserError(
                    f"output.dir: {path} is a link, and a run writes and removes files only in its own folder. "
                    "Replace it by its target. To put runs on another disk, set output.dir to a folder there"
                )
            files = (self.record.name, self.config.name, self.history.name, LOCK, OWNER)
            expected = "file" if path.name in files else "folder" if path == self.checkpoints else ""
            if expected and path.is_dir() != (expected == "folder"):
                raise UserError(f"output.dir: {path} is not a {expected}. Remove it")

    def _owner(self) -> dict[str, Any]:
        try:
            with open_regular(self.path / OWNER) as file:
                values = json.loads(file.read())
        except (OSError, ValueError, RecursionError):
            return {}
        return values if isinstance(values, dict) else {}

    def _owner_is_gone(self) -> bool:
        owner = self._owner()
        if owner.get("host") == socket.gethostname() and isinstance(owner.get("pid"), int):
            try:
                os.kill(owner["pid"], 0)
            except ProcessLookupError:
                return True
            except (OSError, OverflowError):  # another user's process, or not a valid number
                pass
        return False

    def _in_use(self) -> str:
        owner = self._owner()
        known = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('started')}"
        who, command = (
            known if owner else "another process",
            f": {owner['command']}" if "command" in owner else "",
        )
        return (
            f"output.dir: this run is under way already, by {who}{command}\nIts folder is {self.path}. Wait for it, or "
            "end it and repeat the command, which resumes from the last checkpoint"
        )

    def clear(self) -> None:
        """Remove all files of an earlier run, its record first."""
        self.record.unlink(missing_ok=True)
        for entry in list(self.path.iterdir()):
            if entry.name not in (LOCK, OWNER):
                remove(entry)

    def remove_if_empty(self) -> None:
        """Remove the folder and its parent if they hold nothing but the lock."""
        with contextlib.suppress(OSError):
            if {entry.name for entry in self.path.iterdir()} <= {LOCK, OWNER}:
                for name in (OWNER, LOCK):
                    (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()
            self.path.parent.rmdir()

    def drop_checkpoints(self) -> None:
        """Remove the checkpoints of a finished run."""
        with contextlib.suppress(OSError):  # leftovers do no harm
            remove(self.checkpoints)

    def tidy(self) -> None:
        """Remove leftovers of a run that was killed after its record was written, unless another one is under way."""
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
        """Sync history.jsonl to the disk: a checkpoint relies on its lines."""
        if self.history.exists():
            sync(self.history)

    def rewind_history(self, step: int) -> None:
        """Drop the lines that a run resumed from `step` writes again, and a line that was cut short.

        These are the lines after the step, and all from the closing line on: the final evaluations follow it.
        """
        if self.history.exists():
            entries = self.read_history()
            is_repeated = (n for n, line in enumerate(entries) if line["step"] > step or CLOSING in line)
            first = next(is_repeated, len(entries))
            write_atomically(self.history, "".join(dumps(line) + "\n" for line in entries[:first]))

    def read_history(self) -> list[dict[str, Any]]:
        """Return the valid lines of history.jsonl: see `camex_ft.utils.logs`."""
        return read_lines(self.history)

    def write_record(self, record: Record) -> None:
        """Write record.json atomically."""
        write_atomically(self.record, record.to_json())


def find_done(folder: RunFolder | Path | str) -> Record | None:
    """Return the record of a finished run, or None; an invalid record counts as none."""
    try:
        record = load_record(folder.path if isinstance(folder, RunFolder) else folder)
    except UserError:
        return None
    return record if record.run.status == "done" else None


@contextmanager
def full_disk(folder: str) -> Iterator[None]:
    """Convert out-of-space errors to `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise UserError(
            f"output.dir: there is no room left to write in '{folder}': {reason_full(error)}. Free some space and "
            "repeat the command: it resumes from the last checkpoint. training.save_total_limit=1 saves fewer "
            "checkpoints, output.model=false saves no model"
        ) from error


# -- runs of the same settings ----------------------------------------------------------------------------------------


def find_folder(output: Path, name: str) -> str | None:
    """Return the name of the run folder in `output` that has the hash of `name`, a finished one first, or None.

    The label of the backbone is ignored: the same content may have another name.
    """
    folders = _matching(output, name, 2)
    first = min(folders, key=lambda f: (find_done(f) is None, f.name != name), default=None)
    return first.name if first else None


def may_be_of(folder: Path, backbone: str | None) -> bool:
    """Return whether the record in a folder, if there is one, allows this content of the backbone."""
    if not folder.is_dir():
        return False
    record = find_done(folder)
    return record is None or record.model.backbone_sha256 in (None, backbone)


def has_settings(record: Record, settled: Config) -> bool:
    """Return whether a run had the settings of a configuration, regardless of data and backbone content."""
    data, content = record.data.sha256, record.model.backbone_sha256
    hashes = {hash_by_name(settled, data=data)}
    if content is not None:
        hashes.add(config_hash(settled, data=data, backbone=content))
    return record.run.name.rpartition("--")[2] in hashes


def changes(settled: Config, name: str, *, data: str, backbone: str | None) -> Iterator[str]:
    """Yield a line for each run with the same settings and another hash: its data or backbone changed since.

    The run `name` is about to start, with the SHA-256 of its data and of its backbone's content.
    """
    for folder in _matching(settled.output.path, name, -1):
        if folder.name == name:
            continue
        record = find_done(folder)
        if record is None:
            other = _settings(folder) if any((folder / "checkpoints").glob("*")) else None
            if other is not None and hash_by_name(other, data="-") == hash_by_name(settled, data="-"):
                yield (
                    f"{folder.name} was interrupted. It has the same settings but other data or another backbone, "
                    "so this run starts from the beginning"
                )
            continue
        if not has_settings(record, settled):
            continue
        parts = [("data", record.data.sha256, data), ("backbone", record.model.backbone_sha256, backbone)]
        changed = [
            f"the {part} changed since (SHA-256 {before[:SHOWN]} then, {now[:SHOWN]} now)"
            if before is not None
            else f"its record does not say which content the {part} had (SHA-256 {now[:SHOWN]} now)"
            for part, before, now in parts
            if now is not None and before != now
        ]
        if changed:
            yield f"{record.run.name} has the same settings, but {' and '.join(changed)}: running again"


def differs(checkpoint: Path, *, data: str, backbone: str | None) -> bool:
    """Return whether a checkpoint is known to belong to a run on other data or of another backbone.

    This is known only for a checkpoint in the folder of its run.
    """
    folder = checkpoint.resolve().parent.parent
    settled = _settings(folder)
    if settled is None or not HASH.fullmatch(folder.name):
        return False
    hashes = (config_hash(settled, data=data, backbone=backbone or ""), hash_by_name(settled, data=data))
    return not folder.name.endswith(hashes)


def _settings(folder: Path) -> Config | None:
    """Return the configuration in the folder of a run, or None without a readable one."""
    try:
        return load_config(RunFolder(folder).config)
    except UserError:
        return None


def _matching(output: Path, name: str, part: int) -> list[Path]:
    """Return the run folders in `output` whose names equal `name` except in one part."""
    parts = name.split("--")
    parts[part] = "*"
    folders = (output / "runs").glob("--".join(parts))
    return sorted(path for path in folders if path.is_dir() and path.name.count("--") == len(parts) - 1)
