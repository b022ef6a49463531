"""Checkpoints: the newest that is whole, and why others are passed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from camex_ft.errors import UserError
from camex_ft.training.checkpoints import checkpoints, choose, fault, newest, state_of


def write(folder: Path, step: int) -> Path:
    """A checkpoint as the Trainer leaves it, as far as it is looked at."""
    made = folder / f"checkpoint-{step}"
    made.mkdir()
    for name in ("config.json", "optimizer.pt", "scheduler.pt"):
        (made / name).write_text("{}")
    save_file({"w": torch.zeros(50)}, made / "model.safetensors")
    (made / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return made


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "killed while saving": (lambda c: (c / "trainer_state.json").unlink(), "it has no trainer_state.json"),
    "state cut short": (
        lambda c: (c / "trainer_state.json").write_text('{"glob'),
        "trainer_state.json is not JSON",
    ),
    "no optimizer": (lambda c: (c / "optimizer.pt").unlink(), "it has no optimizer.pt"),
    "no schedule": (lambda c: (c / "scheduler.pt").unlink(), "it has no scheduler.pt"),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "it has no weights"),
    "weights cut short": (lambda c: cut(c / "model.safetensors"), "model.safetensors cannot be read"),
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
