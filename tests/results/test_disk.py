"""A full disk is told as such, whichever library has met it: each writes to /dev/full here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from camex_ft.results.disk import full_disk, is_full
from camex_ft.utils.errors import UserError

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")


def text(file: str) -> None:
    Path(file).write_text("x" * 100_000)


def tensors(file: str) -> None:
    torch.save({"a": torch.zeros(100_000)}, file)


@needs_full
@pytest.mark.parametrize("write", [text, tensors])
def test_a_library_that_finds_no_room(write):
    with (
        pytest.raises(UserError, match=r"output\.dir: there is no room left to write in 'some/results'"),
        full_disk("some/results"),
    ):
        write("/dev/full")


def test_safetensors_words():
    """It writes to a file beside and renames it, so /dev/full is no test: these are its words."""
    assert is_full(RuntimeError("I/O error: No space left on device (os error 28)"))


def test_what_it_came_of_counts():
    error = RuntimeError("could not save")
    assert not is_full(error)
    error.__cause__ = OSError(28, "No space left on device")
    assert is_full(error)


@pytest.mark.parametrize("error", [OSError(13, "Permission denied"), ValueError("x"), UserError("disk")])
def test_other_errors_stay_what_they_are(error, tmp_path):
    with pytest.raises(type(error)) as raised, full_disk("r"):
        raise error
    assert raised.value is error
