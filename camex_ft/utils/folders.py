"""Reasons not to read a folder of a model or a checkpoint, found before any other library opens it.

Whoever made the folder may not be whoever reads it. A link or a name with ``..`` in it would have a loader read, and a
later copy publish, files from elsewhere; a pickle, or code that a configuration names, would be run. Nothing here opens
anything but JSON files of a bounded size, and nothing is imported for it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from camex_ft.utils.durable import open_regular
from camex_ft.utils.errors import UserError

MAX_JSON = 100_000_000  # bytes; the largest tokenizer.json of a released model has some 35 million
MAX_ENTRIES = 20_000  # below one folder; DeepSpeed's checkpoints of many processes have some thousand files
MAX_DEPTH = 16  # folders in folders; loaders go down two, and a clone by git with its objects six
INDEX = ".safetensors.index.json"  # those of other formats are not read
ADAPTER = "adapter_config.json"
WEIGHTS = ("model", "adapter")  # what files of weights are called, of those that loaders look for
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".npy", ".npz", ".joblib")
NO_WEIGHTS = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"}


def unsafe(
    folder: Path | str, *, weights: bool = True, linked: bool = False, adapter: bool = False
) -> str | None:
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
        adapter: whether an adapter of PEFT is expected, which is a fault otherwise.
    """
    try:
        root = Path(folder).resolve()
        if not root.is_dir():
            return None
        jsons: list[Path] = []
        fault = _entries_fault(root, jsons, linked=linked) or _json_fault(root, jsons, adapter=adapter)
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
        elif is_checked(entry.name):
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


def _json_fault(root: Path, jsons: list[Path], *, adapter: bool) -> str | None:
    if not adapter and (root / ADAPTER).exists():  # transformers would put it into the model without a word
        return f"it holds an adapter of PEFT ({ADAPTER}): expected the model with it merged in, or without it"
    for path in sorted(jsons):
        name = path.relative_to(root)
        try:
            data = _read(path)
            if TOKENIZER.fullmatch(path.name) and not may_name_tables(data):
                continue
            content = _parsed(data)
        except ValueError as error:
            return f"its {name} cannot be read: {error}"
        if fault := reference_fault(path.name, content, path.parent):
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


# -- references in JSON files -----------------------------------------------------------------------------------------

# transformers passes every key of ``tokenizer_config.json`` and ``special_tokens_map.json`` to the constructor of the
# tokenizer's class, which may open it as a file, and sets every key of ``config.json``, also of nested configurations.
# So keys are judged by their names, at any depth, whichever class reads them. Checked with transformers 5.23.

SAFE = (".safetensors", ".gguf")  # formats of weights that hold no code
CONFIGS = (
    *("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "processor_config.json", "preprocessor_config.json"),
    *("video_preprocessor_config.json", "modular_config.json"),
)
VERSIONED = re.compile(
    r"(config|tokenizer)\..*\.json"
)  # for some versions of transformers: config.4.0.0.json
TOKENIZER = re.compile(r"tokenizer(\..*)?\.json")
CODE = ("auto_map", "custom_pipelines", "custom_generate", "custom_objects", "trust_remote_code")
NAMED = ("_target_", "__class__", "py/object", "_type")  # how serialised objects name a class to build
PLANS = ("quantization_config", "compression_config")
KERNELS = re.compile(r"(attn|attention|experts)_implementation|kernel")
TABLES = ("vocab", "merges")  # as JSON in place, or a file
NAMED_TABLE = re.compile(rb'"vocab"\s*:\s*"'), re.compile(rb'"merges"\s*:\s*"')
ESCAPES = (b"\\u006", b"\\u007")  # with which the letters of a key may be written
FILES = re.compile(r"(^|_)(files?|paths?|dir|spm|vocab|merges|codes|dic|option|init_inputs)$")
NOT_OPENED = re.compile(r"name_or_path$")
# Written by earlier versions of transformers with the places of the machine that saved the tokenizer; not opened.
STALE = ("special_tokens_map_file", "tokenizer_file")


def is_checked(name: str) -> bool:
    """Return whether a file of this name is one that `reference_fault` knows."""
    return (
        name in CONFIGS
        or name.endswith(INDEX)
        or bool(TOKENIZER.fullmatch(name) or VERSIONED.fullmatch(name))
    )


def reference_fault(name: str, content: Any, folder: Path) -> str | None:
    """Return the first fault of the references in a JSON file of a model's folder, or None.

    The file is one that `is_checked`; its folder is an absolute path without links.
    """
    if name.endswith(INDEX):
        return _index_fault(content)
    if TOKENIZER.fullmatch(name):  # the rest of it is read by the library tokenizers, which opens no files
        model = content.get("model") if isinstance(content, dict) else None
        pairs: Iterable[tuple[str, Any]] = model.items() if isinstance(model, dict) else ()
        faults = (_file_fault(key, value, folder) for key, value in pairs if key in TABLES)
    else:
        faults = (_fault(key, value, folder) for key, value in nested_pairs(content))
    return next((wrong for wrong in faults if wrong is not None), None)


def _index_fault(content: Any) -> str | None:
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict):
        return "has no weight_map"
    for name in shards.values():
        if not is_plain_name(name):
            return f"names {short(name)}, which is no file of the folder itself"
        if not name.endswith(SAFE):
            return f"names {short(name)}, which is not a safetensors file"
    return None


def may_name_tables(text: bytes) -> bool:
    """Return whether a ``tokenizer.json`` may name a file as its vocabulary: parsing one of some MB takes long."""
    return any(escape in text for escape in ESCAPES) or any(name.search(text) for name in NAMED_TABLE)


def nested(value: Any) -> Iterator[Any]:
    """Yield a value of JSON and everything in it."""
    waiting = [value]  # not by recursion: JSON may be nested more deeply than Python calls
    while waiting:
        inner = waiting.pop()
        yield inner
        if isinstance(inner, (dict, list)):
            waiting.extend(inner.values() if isinstance(inner, dict) else inner)


def nested_pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key of nested mappings with its value."""
    for inner in nested(value):
        if isinstance(inner, dict):
            yield from inner.items()


def is_plain_name(name: object) -> bool:
    """Return whether `name` can only be that of a file in the folder itself: no separator, drive, ``..`` or NUL."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(char in name for char in '/\\:"\0')
        and name.isprintable()
    )


def short(value: object) -> str:
    """Return a value for a message, quoted and cut."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fault(key: str, value: Any, folder: Path) -> str | None:
    if key in CODE and value:
        return (
            f"names code of its own ({key}), which is never run: expected a model of one of transformers' own "
            f"classes. If it is one, remove {key}"
        )
    if KERNELS.search(key) and (
        (key == "use_kernels" and value is True)
        or any(
            isinstance(text, str) and "/" in text for text in nested(value)
        )  # a hub id: NAME/KERNEL and more
    ):
        return f"names kernels to be fetched and run ({key}): remove that"
    if key == "transformers_weights" and value is not None:
        if not (is_plain_name(value) and str(value).endswith(SAFE)):
            return f"names {short(value)} as its weights: expected a safetensors file of the folder itself"
    elif key in PLANS:
        named = next((inner for inner, _ in nested_pairs(value) if inner in NAMED), None)
        if named is not None:
            return f"has a {key} that names a class to build ({named})"
    return _file_fault(key, value, folder)


def _file_fault(key: str, value: Any, folder: Path) -> str | None:
    """Return which file elsewhere a key has opened: a text, or texts of a list, which for `TABLES` are tokens."""
    if not FILES.search(key) or NOT_OPENED.search(key):
        return None
    items = value if isinstance(value, list) and key not in TABLES else [value]
    for text in items:
        if isinstance(text, str) and _leads_out(text, folder) and not (key in STALE and _is_gone(text)):
            return (
                f"names {short(text)} ({key}), which is no file of the folder itself and would be read: expected the "
                f"name of a file in the folder. If the model needs none, remove {key}"
            )
    return None


def _leads_out(text: str, folder: Path) -> bool:
    """Return whether a file's name stands for one outside the folder; some are looked up in the working folder."""
    if not text:
        return False
    return not is_plain_name(text) or (os.path.lexists(text) and Path.cwd() != folder)


def _is_gone(text: str) -> bool:
    """Return whether `text` is an absolute path, of any system, at which there is nothing."""
    absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return absolute and text.isprintable() and not os.path.lexists(text)
