"""Checkpoints: the newest that is whole, and why others are passed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from camex_ft.training.checkpoint_folder import (
    FORMAT,
    NEEDED,
    OPTIMIZER,
    SCHEDULE,
    checkpoints,
    choose,
    fault,
    newest,
    read_manifest,
    rotate,
    state_of,
    write_manifest,
)
from camex_ft.utils.errors import UserError


def write(folder: Path, step: int, *, extra: bool = False, best: int | None = None) -> Path:
    """A checkpoint as a trainer leaves it, as far as it is looked at."""
    made = folder / f"checkpoint-{step}"
    (made / "state").mkdir(parents=True)
    for name in NEEDED:
        (made / name).write_text("{}")
    save_file({"w": torch.zeros(50)}, made / "model.safetensors")
    kept = None if best is None else f"/moved/since/checkpoint-{best}"
    (made / "trainer_state.json").write_text(json.dumps({"global_step": step, "best_model_checkpoint": kept}))
    write_manifest(made, extra=extra)
    return made


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    """One bit of the last byte."""
    held = path.read_bytes()
    path.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))


def newer(checkpoint: Path) -> None:
    kept = read_manifest(checkpoint)
    kept |= {"format": FORMAT + 1, "versions": {"camex_ft": "99.0"}}
    (checkpoint / "manifest.json").write_text(json.dumps(kept))


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another program's": (lambda c: (c / "manifest.json").unlink(), "it has no manifest.json"),
    "manifest cut short": (lambda c: cut(c / "manifest.json"), "it has no manifest.json that can be read"),
    "a newer version's": (newer, "it is of format 2, from camex_ft 99.0, and this version reads up to 1"),
    "no state": (lambda c: (c / "trainer_state.json").unlink(), "it has no trainer_state.json"),
    "state cut short": (
        lambda c: (c / "trainer_state.json").write_text('{"glob'),
        "trainer_state.json cannot be read: it has 6 bytes",
    ),
    "no optimizer": (lambda c: (c / OPTIMIZER).unlink(), "it has no state/optimizer.safetensors"),
    "no schedule": (lambda c: (c / SCHEDULE).unlink(), "it has no state/schedule.safetensors"),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "it has no model.safetensors"),
    "weights cut short": (
        lambda c: cut(c / "model.safetensors"),
        "model.safetensors cannot be read: it has 2",
    ),
    "a bit of the weights": (lambda c: flip(c / "model.safetensors"), "its model.safetensors is damaged"),
    "a file too many": (
        lambda c: (c / "pytorch_model.bin").touch(),
        "its pytorch_model.bin is not in its manifest",
    ),
    "a link out of it": (
        lambda c: ((c / "config.json").unlink(), (c / "config.json").symlink_to("/etc/hostname")),
        "config.json",
    ),
}


def test_newest_first_by_number(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-300").write_text("a file")
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]
    assert newest(tmp_path) == (tmp_path / "checkpoint-100", [])
    assert state_of(tmp_path / "checkpoint-20").global_step == 20


def test_no_checkpoint_is_no_fault(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") == (None, [])
    assert choose("auto", tmp_path) == (None, [])


@pytest.mark.parametrize("kind", BREAKS)
def test_a_broken_one_is_passed_over_with_a_note(kind: str, tmp_path: Path) -> None:
    damage, said = BREAKS[kind]
    good = write(tmp_path, 5)
    assert fault(good) is None
    damage(write(tmp_path, 10))
    found, notes = choose("auto", tmp_path)
    assert found == good
    (note,) = notes
    assert note.startswith("checkpoint-10 is passed over") and said in note


def test_where_all_are_broken_training_starts_anew(tmp_path: Path) -> None:
    for step in (1, 2):
        cut(write(tmp_path, step) / "model.safetensors")
    found, notes = choose("auto", tmp_path)
    assert found is None and len(notes) == 2


def test_never_starts_anew(tmp_path: Path) -> None:
    write(tmp_path, 5)
    assert choose("never", tmp_path) == (None, [])


def test_a_checkpoint_may_be_named(tmp_path: Path) -> None:
    named = write(tmp_path, 5)
    write(tmp_path, 10)
    assert choose(str(named), tmp_path / "elsewhere") == (named, [])


def test_a_named_one_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"training.resume: no checkpoint folder at .*expected auto, never or a folder"
    ):
        choose(str(tmp_path / "checkpoint-7"), tmp_path)


@pytest.mark.parametrize("kind", BREAKS)
def test_a_named_one_that_is_broken(kind: str, tmp_path: Path) -> None:
    damage, said = BREAKS[kind]
    named = write(tmp_path, 5)
    damage(named)
    with pytest.raises(UserError, match=r"training.resume: .* cannot be resumed from") as error:
        choose(str(named), tmp_path)
    assert said in str(error.value)


def test_one_whose_best_is_damaged_is_passed_over(tmp_path: Path) -> None:
    """The best model is loaded in the end: going on would end with another one, or with none."""
    write(tmp_path, 5)
    flip(write(tmp_path, 10, best=10) / "model.safetensors")
    write(tmp_path, 15, best=10)
    found, notes = choose("auto", tmp_path)
    assert found == tmp_path / "checkpoint-5"
    assert "checkpoint-15 is passed over: the best one so far, checkpoint-10, is needed" in notes[0]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 4, 6, 8, 10]),
        (2, None, [6, 8]),
        (1, None, [8]),
        (1, 2, [2, 8]),  # the newest stays to go on from
        (3, 2, [2, 6, 8]),
    ],
)
def test_rotation(limit: int | None, best: int | None, left: list[int], tmp_path: Path) -> None:
    """The oldest go, and those of a later step, of an attempt that was given up; extra ones whatever the limit is."""
    for step in (2, 4, 6, 8, 10):
        write(tmp_path, step)
    write(tmp_path, 7, extra=True)
    kept = None if best is None else str(tmp_path / f"checkpoint-{best}")
    rotate(tmp_path, newest=tmp_path / "checkpoint-8", limit=limit, best=kept)
    assert [int(p.name.rpartition("-")[2]) for p in reversed(checkpoints(tmp_path))] == left
    assert len(list(tmp_path.iterdir())) == len(left)
