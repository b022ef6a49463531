"""Files and folders that are whole or not there, whatever ends the process or the machine.

Written under another name beside the place that they are for, brought to the disk (fsync), then renamed, which is one
step of the file system. What is left of an unfinished one begins with a dot and ends in ``.unfinished``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".unfinished"
LEVELS = 4  # <output>/runs/<name>/checkpoints


def unfinished(target: Path) -> Path:
    """Return the name under which `target` is written until it is whole."""
    return target.parent / f".{target.name}{UNFINISHED}"


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some network file systems know no fsync of folders
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Bring all files and folders in a folder, and itself, to the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent) / name)
        sync(Path(parent))


def put(whole: Path, target: Path) -> None:
    """Bring a folder to the disk and rename it to `target`; what was there is removed."""
    sync_tree(whole)
    if target.exists():
        remove(target)
    os.replace(whole, target)
    for parent in list(target.parents)[:LEVELS]:  # they may be new themselves
        with suppress(PermissionError):  # of a folder that is another user's
            sync(parent)


def remove(folder: Path) -> None:
    """Remove a folder so that no part of it is ever seen under its name."""
    doomed = unfinished(folder.with_name(f"{folder.name}.removed"))
    shutil.rmtree(doomed, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a new folder to write into, which becomes `target` where the body ends well, and else is removed at once."""
    draft = unfinished(target)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        put(draft, target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)  # a full disk gets its room back
        raise


def sweep(folder: Path) -> None:
    """Remove what was left unfinished in a folder by a process that is gone."""
    for path in folder.glob(f".*{UNFINISHED}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it into place: a reader sees the old file or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
