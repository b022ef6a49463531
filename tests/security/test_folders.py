"""Folders of models that nobody should read: each is refused before any other library opens it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from camex_ft.backbones import source
from camex_ft.utils import folders
from camex_ft.utils.errors import UserError
from tests.helpers.hostile_folders import REFUSED, config, loot


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
    with pytest.raises(UserError, match=f"backbone {folder}: it"):
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
