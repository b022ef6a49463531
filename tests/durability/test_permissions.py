"""The umask decides the permissions of everything that is written, whichever library writes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from camex_ft import upcycling
from camex_ft.analysis import inspect
from camex_ft.config import load_config
from camex_ft.exporting.export import export
from camex_ft.results.run_folder import RunFolder
from camex_ft.run import pipeline
from camex_ft.utils.durable import whole_folder, write_atomically, write_named
from tests.helpers.killed_runs import write

UMASKS = (0o002, 0o022, 0o027, 0o077)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def others(folder: Path, mask: int) -> dict[str, str]:
    """What is below a folder and has other permissions than the umask leaves to new files and folders."""
    found = {}
    for path in folder.rglob("*"):
        mode = path.stat().st_mode & 0o777
        if mode != (0o777 if path.is_dir() else 0o666) & ~mask:
            found[path.relative_to(folder).as_posix()] = oct(mode)
    return found


@pytest.mark.parametrize("mask", UMASKS, ids=oct)
def test_files_and_folders(mask: int, tmp_path: Path) -> None:
    with umask(mask):
        write_atomically(tmp_path / "a", "text")
        write_named(tmp_path / "b", b"bytes")
        with whole_folder(tmp_path / "model") as folder:
            (folder / "below").mkdir()
            save_file({"w": torch.ones(2)}, folder / "below" / "model.safetensors")
        run = RunFolder.create(tmp_path, "run")
        with run.alone():
            run.append_history({"step": 1, "epoch": 0.5})
            assert others(tmp_path, mask) == {}
        assert others(tmp_path, mask) == {}


@pytest.mark.parametrize(
    "mask",
    [pytest.param(mask, marks=pytest.mark.slow) if mask != 0o077 else mask for mask in UMASKS],
    ids=oct,
)
def test_whatever_a_run_leaves(
    mask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also while it is under way, and of the commands that use it."""
    seen: list[dict[str, str]] = []
    drop = RunFolder.drop_checkpoints

    def look(folder: RunFolder) -> None:
        assert list(folder.checkpoints.glob("checkpoint-*/state/*.safetensors"))
        seen.append(others(tmp_path, mask))
        drop(folder)

    monkeypatch.setattr(RunFolder, "drop_checkpoints", look)
    with umask(mask):
        config = write(tmp_path / "results", "ties-ca", tmp_path / "run.yaml")
        shorter = [
            "merging.protocol=domain-ca",
            "training.max_steps=2",
            "training.save_steps=2",
            "tuning.mode=lora",
        ]
        pipeline.run(load_config(str(config), shorter))
        (run,) = (tmp_path / "results" / "runs").iterdir()
        assert (run / "model" / "adapter.safetensors").is_file()
        if mask != 0o077:  # in the slow ones
            export(run, tmp_path / "dense", rows=4)
            inspect(run)
        upcycling.save(upcycling.load(run / "model"), tmp_path / "again")
        assert list((run / "predictions").iterdir())
    assert seen == [{}]
    assert others(tmp_path, mask) == {}
