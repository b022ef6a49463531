"""Folders of a model that nobody should read: ways to make one of a whole folder, and what is said of it."""

from __future__ import annotations

import json
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path], object]


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def loot(folder: Path) -> Path:
    return folder.parent / "loot"


def config(**fields: Any) -> Change:
    return lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "bert", **fields}))


def index(*names: Any) -> Change:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        text = json.dumps({"weight_map": dict(enumerate(names))})
        (folder / "model.safetensors.index.json").write_text(text)

    return write


def link(name: str, target: str) -> Change:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Payload(loot(folder))}))


def listening(folder: Path) -> None:
    (folder / "vocab.txt").unlink()
    here = os.getcwd()
    os.chdir(folder)  # a socket's whole path may have no more than 100 characters
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind("vocab.txt")
    finally:
        os.chdir(here)


def too_deep(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")


REFUSED: dict[str, tuple[Change, str]] = {
    "link out": (link("vocab.txt", "/etc/hostname"), "its vocab.txt is a link out of the folder"),
    "weights elsewhere": (link("model.safetensors", "../elsewhere"), "its model.safetensors is a link out"),
    "link to a folder": (link("deep", "/etc"), "its deep is a link out"),
    "link to nothing": (link("merges.txt", "nowhere"), "its merges.txt is a link that leads nowhere"),
    "circle": (link("merges.txt", "merges.txt"), "its merges.txt is a link that leads nowhere"),
    "link in a folder": (
        lambda f: ((f / "sub").mkdir(), link("a", "/etc/hostname")(f / "sub")),
        "its sub/a is a",
    ),
    "pipe": (lambda f: os.mkfifo(f / "tokenizer.json"), "its tokenizer.json is neither a file nor a folder"),
    "socket": (listening, "its vocab.txt is neither a file"),
    "pickle": (pickled, "its weights are stored only as pytorch_model.bin, a format that can run code"),
    "pickle beside other tensors": (
        lambda f: (pickled(f), (f / "x.safetensors").write_bytes((f.parent / "elsewhere").read_bytes())),
        "its weights are stored only as pytorch_model.bin",
    ),
    "index up": (index("../elsewhere"), "names '../elsewhere', which is no file of the folder itself"),
    "index absolute": (index("/etc/hostname"), "names '/etc/hostname', which is no file"),
    "index of Windows": (index("..\\elsewhere.safetensors"), "which is no file of the folder itself"),
    "index with NUL": (index("a\0.safetensors"), "which is no file of the folder itself"),
    "index with a number": (index(3), "names 3, which is no file"),
    "index of pickles": (index("pytorch_model.bin"), "which is not a safetensors file"),
    "index without a map": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        "has no weight_map",
    ),
    "code": (config(auto_map={"AutoModel": "evil.Model"}), "names code of its own (auto_map)"),
    "code of a tokenizer": (
        lambda f: (f / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["a.B", null]}}'),
        "its tokenizer_config.json names code",
    ),
    "kernels": (config(attn_implementation="somebody/kernel"), "names kernels to be fetched"),
    "weights by name": (config(transformers_weights="../x.safetensors"), "names '../x.safetensors' as its"),
    "class to build": (
        config(quantization_config={"a": [{"_type": "os.system", "_data": "touch x"}]}),
        "names a class to build (_type)",
    ),
    "nested": (too_deep, "its config.json cannot be read: it is nested too deeply"),
    "not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\0"), "its config.json cannot be read"),
}
