"""Why a folder of a model or a checkpoint is not to be read: asked before any other library opens it.

Whoever made the folder may not be whoever reads it. A link or a name with ``..`` in it would have a loader read, and a
later copy publish, files from elsewhere; a pickle, or code that a configuration names, would be run. Nothing here opens
anything but JSON files of a bounded size, and nothing is imported for it.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from camex_ft.errors import UserError

MAX_JSON = 100_000_000  # bytes; the largest tokenizer.json of a released model has some 35 million
MAX_ENTRIES = 20_000  # below one folder; DeepSpeed's checkpoints of many processes have some thousand files
MAX_DEPTH = 4  # folders in folders that are looked into; loaders go down two
INDEX = ".index.json"
SAFE = (".safetensors", ".gguf")
WEIGHTS = ("model", "adapter")  # what files of weights are called, of those that loaders look for
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".npy", ".npz", ".joblib")
NO_WEIGHTS = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"}
CONFIGS = (
    *("config.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json"),
    *("processor_config.json", "preprocessor_config.json"),
)
CODE = ("auto_map", "custom_pipelines", "custom_generate", "custom_objects")  # each names code to import
NAMED = ("_target_", "__class__", "py/object", "_type")  # how serialised objects name a class to build
ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
KERNELS = (*ATTENTION, "experts_implementation", "_experts_implementation")


def unsafe(folder: Path | str, *, weights: bool = True) -> str | None:
    """Return why the folder of a model or a checkpoint is not to be read, or None where nothing speaks against it.

    Looked for are: links that lead out of it (but not those of the hub cache, from a snapshot to its blobs) or into
    nothing; pipes, devices and sockets; weights that are there as pickle only; an index that names files elsewhere; a
    configuration that names code to be run. A folder without any weights is safe, and so is one that is not there.

    Args:
        folder: of the model; a link to it is followed, since the user has named it.
        weights: whether pickles in place of weights are a fault: not where its configuration and tokenizer alone are
            read, or its reader has said what it expects.
    """
    try:
        root = Path(folder).resolve()
        if not root.is_dir():
            return None
        fault = _entries_fault(root) or _config_fault(root) or _index_fault(root)
        return fault or (_pickle_fault(root) if weights else None)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error} ({error.filename or folder})"
    except RuntimeError as error:  # a circle of links, before Python 3.13
        return f"it cannot be read: {error}"


def is_plain_name(name: object) -> bool:
    """Return whether `name` can only be that of a file in the folder itself: no separator, drive, ``..`` or NUL."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(char in name for char in '/\\:"\0')
        and name.isprintable()
    )


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        ValueError: it is larger than `MAX_JSON`, no file, not UTF-8, not JSON, or nested too deeply for Python.
        OSError: it cannot be read.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is no file")
    if about.st_size > MAX_JSON:
        raise ValueError(f"it is larger than {MAX_JSON:,} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
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
            shown = _short(shown)
        raise UserError(f"{shown} cannot be written: {reason}") from error


def _entries_fault(root: Path) -> str | None:
    allowed = [root]
    if root.parent.name == "snapshots":  # of the hub cache: files are links to ../../blobs
        allowed.append(root.parent.parent / "blobs")
    for count, entry in enumerate(_walk(root, 0), start=1):
        name = os.path.relpath(entry.path, root)
        if count > MAX_ENTRIES:
            return f"it holds more than {MAX_ENTRIES:,} files: expected the folder of one model"
        if entry.is_symlink():
            target = Path(os.path.realpath(entry.path))
            if not target.exists():
                return f"its {name} is a link that leads nowhere. Copy the folder with the files themselves"
            if not any(target.is_relative_to(place) for place in allowed):
                return f"its {name} is a link out of the folder. Copy the folder with the files themselves"
            mode = target.stat().st_mode
        else:
            mode = entry.stat(follow_symlinks=False).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return f"its {name} is neither a file nor a folder but a pipe, socket or device"
    return None


def _walk(folder: Path | str, depth: int) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry
            if depth < MAX_DEPTH and entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path, depth + 1)


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
                return f"its {path.name} names {_short(name)}, which is no file of the folder itself"
            if not name.endswith(SAFE):
                return f"its {path.name} names {_short(name)}, which is not a safetensors file"
    return None


def _config_fault(root: Path) -> str | None:
    for name in CONFIGS:
        path = root / name
        if not path.is_file():
            continue
        try:
            content = read_json(path)
        except ValueError as error:
            return f"its {name} cannot be read: {error}"
        if fault := _code_fault(content):
            return f"its {name} {fault}"
    return None


def _code_fault(content: Any) -> str | None:
    """Return what in a configuration would have code of its own run, or files elsewhere read."""
    if not isinstance(content, dict):
        return None  # whoever reads it says what it expected
    for key in CODE:
        if content.get(key):
            return (
                f"names code of its own ({key}), which is never run: expected a model of one of transformers' own "
                f"classes. If it is one, remove {key}"
            )
    if any(isinstance(value, str) and "/" in value for value in map(content.get, KERNELS)):
        return "names kernels to be fetched and run (attn_implementation): remove that"
    weights = content.get("transformers_weights")
    if weights is not None and not (is_plain_name(weights) and str(weights).endswith(SAFE)):
        return f"names {_short(weights)} as its weights: expected a safetensors file of the folder itself"
    for section in ("quantization_config", "compression_config"):
        if named := next((key for key in _keys(content.get(section)) if key in (*CODE, *NAMED)), None):
            return f"has a {section} that names a class to build ({named})"
    return None


def _keys(value: Any) -> Iterator[str]:
    """Yield every key in nested mappings and lists."""
    waiting = [value]  # not by recursion: JSON may be nested more deeply than Python calls
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict):
            yield from inner
            waiting.extend(inner.values())
        elif isinstance(inner, list):
            waiting.extend(inner)


def _pickle_fault(root: Path) -> str | None:
    names = sorted(path.name for path in root.iterdir() if path.is_file())
    if any(name.endswith(SAFE) and name.startswith(WEIGHTS) for name in names):
        return None  # others beside them are not read
    pickles = [name for name in names if name.endswith(PICKLES) and not _no_weights(name)]
    if not pickles:
        return None
    return (
        f"its weights are stored only as {', '.join(pickles[:3])}, a format that can run code when loaded and is "
        "refused; expected safetensors. If you trust it, convert it once: load it with transformers elsewhere and "
        "call save_pretrained"
    )


def _no_weights(name: str) -> bool:
    return name in NO_WEIGHTS or name.startswith("rng_state")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
