"""Folders of models that nobody should read: each is refused before any other library opens it."""

from __future__ import annotations

import json
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from camex_ft import folders
from camex_ft.backbones import source
from camex_ft.errors import UserError

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    config()(made)
    (made / "vocab.txt").write_text("[PAD]\n")
    save_file({"weight": torch.ones(1)}, made / "model.safetensors")
    (tmp_path / "elsewhere").write_bytes((made / "model.safetensors").read_bytes())
    return made


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, folder: Path) -> None:
    change, message = REFUSED[name]
    assert folders.unsafe(folder) is None
    change(folder)
    fault = folders.unsafe(folder)
    assert fault is not None and message in fault
    with pytest.raises(UserError, match=f"backbone {folder}: its"):
        source.check(str(folder))
    assert not loot(folder).exists()


def test_what_is_not_read_is_not_refused(folder: Path) -> None:
    """Pickles beside safetensors, or where only the architecture is asked for; links within; no folder at all."""
    (folder / "pytorch_model.bin").write_bytes(b"whatever")
    (folder / "link").symlink_to("vocab.txt")
    assert folders.unsafe(folder) is None
    (folder / "model.safetensors").unlink()
    assert folders.unsafe(folder) is not None
    assert folders.unsafe(folder, weights=False) is None
    assert folders.unsafe(folder / "not-there") is None


def test_a_snapshot_of_the_hub_cache(folder: Path, tmp_path: Path) -> None:
    """Its files are links to the cache's blobs, and to nothing else of it."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert folders.unsafe(snapshot) is None
    (tmp_path / "named").symlink_to(snapshot)
    assert folders.unsafe(tmp_path / "named") is None
    (snapshot / "vocab.txt").unlink()
    (snapshot / "vocab.txt").symlink_to("../../../elsewhere")
    assert "link out of the folder" in str(folders.unsafe(snapshot))


def test_a_folder_without_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MAX_ENTRIES", 3)
    (folder / "more").touch()
    assert "more than 3 files" in str(folders.unsafe(folder))
    monkeypatch.setattr(folders, "MAX_JSON", 5)
    with pytest.raises(ValueError, match="larger than 5 bytes"):
        folders.read_json(folder / "config.json")


@given(
    st.text(max_size=12) | st.sampled_from(["..", ".", "a/b", "..\\a", "C:a", "a\0", "a\n", "ok.safetensors"])
)
def test_a_plain_name_stays_in_its_folder(name: str) -> None:
    """Whatever is plain is one component of a path, and so is the same name by Windows' rules."""
    if folders.is_plain_name(name):
        base = os.path.join(os.sep, "base")
        assert os.path.dirname(os.path.normpath(os.path.join(base, name))) == base
        assert "\\" not in name and ":" not in name and "\n" not in name
