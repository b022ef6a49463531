"""The columns of files, checked without their rows: what `validate` says is what a run would say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from camex_ft import cli
from camex_ft.data import headers
from camex_ft.utils import registry
from camex_ft.utils.errors import UserError
from tests.helpers.task_files import ROWS, SST2, complaint, write

FORMATS = ("parquet", "jsonl", "csv", "tsv")


def said(folder: Path, task: Any = SST2, **serves: str) -> str:
    """Return what is wrong with the headers, or the empty text."""
    try:
        headers.check_headers(task, folder, serves)
    except UserError as error:
        return " ".join(str(error).split())
    return ""


def both(
    folder: Path, suffix: str, rows: list[dict[str, Any]] = ROWS, **changes: list[dict[str, Any]]
) -> Path:
    for split in ("train", "validation"):
        write(folder / f"{split}.{suffix}", changes.get(split, rows))
    return folder


def without(name: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != name} for row in ROWS]


@pytest.mark.parametrize("suffix", [*FORMATS, "json"])
def test_files_that_a_run_reads_pass(tmp_path: Path, suffix: str) -> None:
    assert said(both(tmp_path, suffix)) == ""
    assert said(both(tmp_path, suffix, without("idx"))) == ""  # numbered by the row


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("column", ["sentence", "label"])
def test_a_missing_column_is_said_as_a_run_says_it(
    tmp_path: Path, suffix: str, split: str, column: str
) -> None:
    both(tmp_path, suffix, **{split: without(column)})
    assert said(tmp_path) == complaint(tmp_path)
    assert f"{split}.{suffix}: glue/sst2 needs the column {column}; found " in said(tmp_path)


def test_a_test_split_needs_no_labels_and_need_not_be_there(tmp_path: Path) -> None:
    both(tmp_path, "jsonl")
    write(tmp_path / "test.jsonl", without("label"))
    assert said(tmp_path) == ""
    write(tmp_path / "test.jsonl", without("sentence"))
    assert "test.jsonl: glue/sst2 needs the column sentence" in said(tmp_path)


def test_missing_files_splits_and_folders_are_said_as_a_run_says_them(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        assert said(folder) == complaint(folder)
    write(tmp_path / "train.csv", ROWS)
    assert said(tmp_path) == complaint(tmp_path)
    assert said(tmp_path, validation="train") == ""
    assert said(tmp_path, valid="train").startswith(
        "glue/sst2 has no split 'valid'. Did you mean 'validation'?"
    )


def test_the_benchmarks_own_headers_pass(tmp_path: Path) -> None:
    cola = registry.TASKS.get("glue/cola")
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("gj04\t1\t\tThe sailors rode the breeze.\n")
    assert said(tmp_path, cola) == ""
    squad = {"data": [{"title": "t", "paragraphs": []}]}
    (tmp_path / "own").mkdir()
    for name in ("train-v1.1", "dev-v1.1"):
        (tmp_path / "own" / f"{name}.json").write_text(json.dumps(squad))
    assert said(tmp_path / "own", registry.TASKS.get("qa/squad")) == ""


@pytest.mark.parametrize("name", ["glue/mnli", "glue/ax", "superglue/multirc", "qa/wikiqa", "lm/text"])
def test_every_kind_of_task_takes_its_own_columns(tmp_path: Path, name: str) -> None:
    task = registry.TASKS.get(name)
    for split in task.all_splits():
        columns = [c for c in task.owner(split).features if c != "idx"]
        write(tmp_path / f"{split}.jsonl", [dict.fromkeys([*columns, "idx"], "x")])
    if name != "glue/ax":  # its train splits lie in another task's folder
        assert said(tmp_path, task) == ""


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{", b"[1]", b"\xff\xfe", b"nonsense", b"\0" * 9])
@pytest.mark.parametrize("suffix", [*FORMATS, "json"])
def test_files_that_do_not_tell_are_left_to_the_run(tmp_path: Path, suffix: str, content: bytes) -> None:
    """Nothing but `UserError` is raised, and nothing is refused that a run would take."""
    both(tmp_path, "jsonl")
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / f"train.{suffix}").write_bytes(content)
    if said(tmp_path):
        complaint(tmp_path)


def test_rows_are_not_read(tmp_path: Path) -> None:
    both(tmp_path, "jsonl")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("broken\n")
    assert said(tmp_path) == "" and "line 4 is not JSON" in complaint(tmp_path)


def test_validate_says_it(tmp_path: Path) -> None:
    both(tmp_path, "csv", train=without("label"))
    shown = CliRunner().invoke(cli.app, ["validate", "glue", "profile=embedded", f"data.dir={tmp_path}"])
    assert isinstance(shown.exception, UserError) and "needs the column label" in str(shown.exception)
    both(tmp_path, "csv")
    assert (
        CliRunner()
        .invoke(cli.app, ["validate", "glue", "profile=embedded", f"data.dir={tmp_path}"])
        .exit_code
        == 0
    )
