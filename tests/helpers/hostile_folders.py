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


def tokenizer_config(**fields: Any) -> Change:
    return lambda folder: (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def json_file(name: str, content: Any) -> Change:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))

    return write


def below(folder: Path, depth: int) -> Path:
    """A folder in a folder in ...; made."""
    made = folder.joinpath(*("d" * depth))
    made.mkdir(parents=True)
    return made


def hard_link(folder: Path) -> None:
    (folder.parent / "secret").write_text("key")
    os.link(folder.parent / "secret", below(folder, 3) / "vocab.txt")


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
    "kernels in a mapping": (
        config(attn_implementation={"": "somebody/kernel"}),
        "names kernels to be fetched and run (attn_implementation)",
    ),
    "kernels of a nested configuration": (
        config(text_config={"a": [{"_attn_implementation": {"": ["x", {"b": "paged|me/k@main:f"}]}}]}),
        "names kernels to be fetched and run (_attn_implementation)",
    ),
    "kernels of experts": (
        config(_experts_implementation_internal="me/kernel"),
        "(_experts_implementation_internal)",
    ),
    "kernels by a switch": (config(use_kernels=True), "names kernels to be fetched and run (use_kernels)"),
    "nested code": (
        config(text_config={"auto_map": {"AutoConfig": "me/repo--a.B"}}),
        "names code of its own (auto_map)",
    ),
    "code is trusted": (
        tokenizer_config(trust_remote_code=True),
        "names code of its own (trust_remote_code)",
    ),
    "code of one version": (
        json_file("config.4.0.0.json", {"auto_map": {"AutoModel": "evil.Model"}}),
        "its config.4.0.0.json names code",
    ),
    "nested weights by name": (
        config(text_config={"transformers_weights": "x.bin"}),
        "names 'x.bin' as its weights",
    ),
    "nested class to build": (
        config(text_config={"quantization_config": {"_target_": "os.system"}}),
        "names a class to build (_target_)",
    ),
    "an adapter of PEFT": (
        json_file("adapter_config.json", {"base_model_name_or_path": "somebody/model"}),
        "it holds an adapter of PEFT (adapter_config.json)",
    ),
    "vocabulary elsewhere": (
        tokenizer_config(vocab="/etc/hostname"),
        "names '/etc/hostname' (vocab), which is no file of the folder",
    ),
    "merges elsewhere": (tokenizer_config(merges="../elsewhere"), "names '../elsewhere' (merges)"),
    "vocabulary by position": (tokenizer_config(init_inputs=["/etc/hostname"]), "(init_inputs)"),
    "vocabulary of the hub": (tokenizer_config(spm_file="https://a.b/c"), "names 'https://a.b/c' (spm_file)"),
    "tokenizer elsewhere": (
        tokenizer_config(tokenizer_file="/etc/hostname"),
        "names '/etc/hostname' (tokenizer_file)",
    ),
    "tokenizer of one version": (
        tokenizer_config(fast_tokenizer_files=["tokenizer.json", "../tokenizer.4.0.json"]),
        "names '../tokenizer.4.0.json' (fast_tokenizer_files)",
    ),
    "model of a library": (
        tokenizer_config(sp_model_kwargs={"model_file": "/etc/hostname"}),
        "names '/etc/hostname' (model_file)",
    ),
    "vocabulary among special tokens": (
        json_file("special_tokens_map.json", {"vocab": "/etc/hostname"}),
        "its special_tokens_map.json names '/etc/hostname' (vocab)",
    ),
    "vocabulary in a tokenizer.json": (
        json_file("tokenizer.json", {"model": {"type": "WordPiece", "vocab": "/etc/hostname"}}),
        "its tokenizer.json names '/etc/hostname' (vocab)",
    ),
    "vocabulary in a folder": (
        json_file("a/b/tokenizer_config.json", {"vocab": "~/x"}),
        "its a/b/tokenizer_config.json names '~/x' (vocab)",
    ),
    "files of a processor": (json_file("processor_config.json", {"a": {"b_file": "/x"}}), "(b_file)"),
    "pipe below": (lambda f: os.mkfifo(below(f, 7) / "p"), "p is neither a file nor a folder"),
    "link below": (lambda f: link("a", "/dev/zero")(below(f, 9)), "a is a link out of the folder"),
    "without end": (lambda f: below(f, 40), "is nested too deeply to check"),
    "hard link": (hard_link, "its d/d/d/vocab.txt is a hard link, and the file has other names outside"),
    "nested": (too_deep, "its config.json cannot be read: it is nested too deeply"),
    "not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\0"), "its config.json cannot be read"),
}
