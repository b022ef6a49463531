"""Reasons not to read a folder of a model or a checkpoint, found before any other library opens it.

Whoever made the folder may not be whoever reads it. A link or a name with ``..`` in it would have a loader read, and a
later copy publish, files from elsewhere; a pickle, or code that a configuration names, would be run. Nothing here opens
anything but JSON files of a bounded size, and nothing is imported for it. What those files refer to is judged by
`camex_ft.utils.references`.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from camex_ft.utils import references
from camex_ft.utils.durable import open_regular
from camex_ft.utils.errors import UserError
from camex_ft.utils.references import SAFE, is_plain_name, short

MAX_JSON = 100_000_000  # bytes; the largest tokenizer.json of a released model has some 35 million
MAX_ENTRIES = 20_000  # below one folder; DeepSpeed's checkpoints of many processes have some thousand files
MAX_DEPTH = 16  # folders in folders; loaders go down two, and a clone by git with its objects six
INDEX = ".index.json"
ADAPTER = "adapter_config.json"
WEIGHTS = ("model", "adapter")  # what files of weights are called, of those that loaders look for
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".npy", ".npz", ".joblib")
NO_WEIGHTS = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"}


def unsafe(folder: Path | str, *, weights: bool = True, linked: bool = False) -> str | None:
    """Return why the folder of a model or a checkpoint is not to be read, or None where nothing speaks against it.

    Looked for are: links that lead out of it (but not those of the hub cache, from a snapshot to its blobs) or into
    nothing; pipes, devices and sockets; folders nested too deeply to check; weights that are there as pickle only; an
    index that names files elsewhere; JSON that names code to be run or files elsewhere; an adapter of PEFT. A folder
    without any weights is safe, and so is one that is not there.

    Args:
        folder: of the model; a link to it is followed, since the user has named it.
        weights: whether pickles in place of weights are a fault: not where its configuration and tokenizer alone are
            read, or its reader has said what it expects.
        linked: whether files may have hard links elsewhere, as those of packages that an installer linked to its cache.
    """
    try:
        root = Path(folder).resolve()
        if not root.is_dir():
            return None
        jsons: list[Path] = []
        fault = _entries_fault(root, jsons, linked=linked) or _json_fault(root, jsons) or _index_fault(root)
        return fault or (_pickle_fault(root) if weights else None)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error} ({error.filename or folder})"
    except RuntimeError as error:  # a circle of links, before Python 3.13
        return f"it cannot be read: {error}"


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        ValueError: it is larger than `MAX_JSON`, not UTF-8, not JSON, or nested too deeply for Python.
        OSError: it cannot be read, or is no regular file.
    """
    return _parsed(_read(path))


def _read(path: Path) -> bytes:
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_JSON:
            raise ValueError(f"it is larger than {MAX_JSON:,} bytes")
        return file.read(MAX_JSON)


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Make what keeps the body from writing to `path`, which the user has named, a `UserError`.

    The body writes and does nothing else: whatever the file system or the name itself refuses is meant.
    """
    try:
        yield
    except (OSError, ValueError) as error:  # a ValueError of a name with NUL, or of no encoding
        shown, reason = str(path), getattr(error, "strerror", None) or error
        if not shown.isprintable() or len(shown) > 200:
            shown = short(shown)
        raise UserError(f"{shown} cannot be written: {reason}") from error


def _entries_fault(root: Path, jsons: list[Path], *, linked: bool) -> str | None:
    """Return the first fault of the entries below a folder, or None; add JSON files to be checked to `jsons`."""
    allowed = [root]
    if root.parent.name == "snapshots":  # of the hub cache: files are links to ../../blobs
        allowed.append(root.parent.parent / "blobs")
    names: dict[tuple[int, int], str] = {}  # of files with several hard links, by device and inode
    links: Counter[tuple[int, int]] = Counter()
    for count, (entry, depth) in enumerate(_walk(root), start=1):
        name = os.path.relpath(entry.path, root)
        if count > MAX_ENTRIES:
            return f"it holds more than {MAX_ENTRIES:,} files: expected the folder of one model"
        if entry.is_symlink():
            target = Path(os.path.realpath(entry.path))
            if not target.exists():
                return f"its {name} is a link that leads nowhere. Copy the folder with the files themselves"
            if not any(target.is_relative_to(place) for place in allowed):
                return f"its {name} is a link out of the folder. Copy the folder with the files themselves"
            about = target.stat()
        else:
            about = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(about.st_mode) and about.st_nlink > 1:
                file = (about.st_dev, about.st_ino)
                names[file] = name
                links[file] += 1
                if links[file] == about.st_nlink:
                    del names[file]  # all of them are in the folder
        if stat.S_ISDIR(about.st_mode):
            if depth == MAX_DEPTH:
                return (
                    f"its {short(name)} is nested too deeply to check: expected {MAX_DEPTH} folders at most"
                )
        elif not stat.S_ISREG(about.st_mode):
            return f"its {name} is neither a file nor a folder but a pipe, socket or device"
        elif references.is_checked(entry.name):
            jsons.append(Path(entry.path))
    if names and not linked:
        return (
            f"its {min(names.values())} is a hard link, and the file has other names outside the folder. Copy the "
            "folder with the files themselves (cp -r)"
        )
    return None


def _walk(root: Path) -> Iterator[tuple[os.DirEntry[str], int]]:
    """Yield the entries below a folder, each with how many folders are above it, links not followed."""
    waiting = [(str(root), 0)]
    while waiting:
        folder, depth = waiting.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                yield entry, depth
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((entry.path, depth + 1))


def _index_fault(root: Path) -> str | None:
    for path in sorted(root.glob(f"*{INDEX}")):
        if not path.name.endswith(f".safetensors{INDEX}"):
            continue  # of another format's weights, which are not read
        try:
            content = read_json(path)
        except ValueError as error:
            return f"its {path.name} cannot be read: {error}"
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict):
            return f"its {path.name} has no weight_map"
        for name in shards.values():
            if not is_plain_name(name):
                return f"its {path.name} names {short(name)}, which is no file of the folder itself"
            if not name.endswith(SAFE):
                return f"its {path.name} names {short(name)}, which is not a safetensors file"
    return None


def _json_fault(root: Path, jsons: list[Path]) -> str | None:
    if (root / ADAPTER).exists():  # transformers would put it into the model without a word
        return f"it holds an adapter of PEFT ({ADAPTER}): expected the model with it merged in, or without it"
    for path in sorted(jsons):
        name = path.relative_to(root)
        try:
            data = _read(path)
            if references.TOKENIZER.fullmatch(path.name) and not references.may_name_tables(data):
                continue
            content = _parsed(data)
        except ValueError as error:
            return f"its {name} cannot be read: {error}"
        if fault := references.fault(path.name, content, path.parent):
            return f"its {name} {fault}"
    return None


def _pickle_fault(root: Path) -> str | None:
    names = sorted(path.name for path in root.iterdir() if path.is_file())
    if any(name.endswith(SAFE) and name.startswith(WEIGHTS) for name in names):
        return None  # others beside them are not read
    others = [name for name in names if name in NO_WEIGHTS or name.startswith("rng_state")]
    pickles = [name for name in names if name.endswith(PICKLES) and name not in others]
    if not pickles:
        return None
    return (
        f"its weights are stored only as {', '.join(pickles[:3])}, a format that can run code when loaded and is "
        "refused; expected safetensors. If you trust it, convert it once: load it with transformers elsewhere and "
        "call save_pretrained"
    )
