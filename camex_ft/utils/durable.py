"""Files and folders that are whole or not there, whatever ends the process or the machine.

Written under another name beside the place that they are for, brought to the disk (fsync), then renamed, which is one
step of the file system. What is left of an unfinished one begins with a dot and ends in ``.unfinished``. All have the
permissions of new files, which the umask decides, whatever library wrote them.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".unfinished"
LEVELS = 4  # <output>/runs/<name>/checkpoints


def unfinished(target: Path) -> Path:
    """Return the name under which `target` is written until it is whole."""
    return target.parent / f".{target.name}{UNFINISHED}"


def open_regular(path: Path | str) -> BinaryIO:
    """Open a file for reading bytes, without waiting, as one waits for a pipe that nobody writes into.

    Raises:
        OSError: it is not there, cannot be read, or is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):  # asked of what was opened: a name can change in between
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return os.fdopen(handle, "rb")


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


def by_umask(folder: Path, files: Iterable[Path]) -> None:
    """Give files the permissions of new files in `folder`: safetensors makes its own readable for one user alone.

    A new file tells which these are: the process's umask can be read only by setting it, for all threads.
    """
    probe = folder / f".{secrets.token_hex(8)}{UNFINISHED}"
    handle = _create(probe)
    try:
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        probe.unlink()
    for path in files:
        about = path.lstat()
        if stat.S_ISREG(about.st_mode) and stat.S_IMODE(about.st_mode) != mode:
            path.chmod(mode)


def put(whole: Path, target: Path) -> None:
    """Bring a folder to the disk and rename it to `target`; what was there is removed."""
    by_umask(whole, (Path(parent) / name for parent, _, names in os.walk(whole) for name in names))
    sync_tree(whole)
    if os.path.lexists(target):
        remove(target)
    os.replace(whole, target)
    for parent in list(target.parents)[:LEVELS]:  # they may be new themselves
        with suppress(PermissionError):  # of a folder that is another user's
            sync(parent)


def delete(path: Path) -> None:
    """Remove a folder with its content, a file, or a link without its target; ignore what cannot be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a folder, file or link so that no part of it is ever seen under its name."""
    doomed = unfinished(path.with_name(f"{path.name}.removed"))
    delete(doomed)
    with suppress(FileNotFoundError):
        os.replace(path, doomed)
    delete(doomed)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder to write into, which becomes `target` if the body succeeds and is removed if it fails."""
    draft = unfinished(target)
    delete(draft)
    draft.mkdir(parents=True)
    try:
        yield draft
        put(draft, target)
    except BaseException:
        delete(draft)  # a full disk gets its room back
        raise


def sweep(folder: Path) -> None:
    """Remove unfinished files and folders that an ended process left in a folder."""
    for path in folder.glob(f".*{UNFINISHED}"):
        delete(path)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside `path` and rename into place: a reader sees the old file or the new one, never a part.

    A link at `path` is replaced, and what it leads to stays.
    """
    draft = path.parent / f".{path.name[:50]}.{secrets.token_hex(8)}{UNFINISHED}"
    try:
        with os.fdopen(_create(draft), "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_named(path: Path, content: str | bytes) -> None:
    """Write a file that the user has named: a link is followed; a pipe or device is written to as it is."""
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
    else:
        write_atomically(Path(os.path.realpath(path)), content)


def _create(path: Path) -> int:
    """Return the handle of a new file, with the permissions that the umask leaves."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
