"""References in the JSON files of a model's folder: code, kernels and files that a loader would import, fetch or open.

transformers passes every key of ``tokenizer_config.json`` and ``special_tokens_map.json`` to the constructor of the
tokenizer's class, which may open it as a file, and sets every key of ``config.json``, also of nested configurations. So
keys are judged by their names, at any depth, whichever class reads them. Checked with transformers 5.23.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

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
    """Return whether a file of this name is one that `fault` knows."""
    return name in CONFIGS or bool(TOKENIZER.fullmatch(name) or VERSIONED.fullmatch(name))


def fault(name: str, content: Any, folder: Path) -> str | None:
    """Return the first fault of the references in a JSON file of a model's folder, or None.

    Args:
        name: of the file, one that `is_checked`.
        content: its JSON.
        folder: that holds it, an absolute path without links.
    """
    if TOKENIZER.fullmatch(name):  # the rest of it is read by the library tokenizers, which opens no files
        model = content.get("model") if isinstance(content, dict) else None
        pairs: Iterable[tuple[str, Any]] = model.items() if isinstance(model, dict) else ()
        faults = (_file_fault(key, value, folder) for key, value in pairs if key in TABLES)
    else:
        faults = (_fault(key, value, folder) for key, value in nested_pairs(content))
    return next((wrong for wrong in faults if wrong is not None), None)


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
    if KERNELS.search(key) and _names_kernels(key, value):
        return f"names kernels to be fetched and run ({key}): remove that"
    if key == "transformers_weights" and value is not None:
        if not (is_plain_name(value) and str(value).endswith(SAFE)):
            return f"names {short(value)} as its weights: expected a safetensors file of the folder itself"
    elif key in PLANS:
        named = next((inner for inner, _ in nested_pairs(value) if inner in NAMED), None)
        if named is not None:
            return f"has a {key} that names a class to build ({named})"
    return _file_fault(key, value, folder)


def _names_kernels(key: str, value: Any) -> bool:
    """Return whether a text in `value`, at any depth, has the form of a hub id of kernels: NAME/KERNEL and more."""
    named = any(isinstance(text, str) and "/" in text for text in nested(value))
    return named or (key == "use_kernels" and value is True)


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
