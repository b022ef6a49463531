"""Files of every format, and one message for everything that can be wrong with a folder or a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from typer.testing import CliRunner

from camex_ft import cli
from camex_ft.data import sources
from camex_ft.data.split_files import check_headers
from camex_ft.utils import registry
from camex_ft.utils.errors import UserError
from tests.helpers.task_files import ROWS, SST2, complaint, load, write
from tests.helpers.task_kinds import CLASSIFICATION


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.{suffix}", ROWS)
    loaded = load(tmp_path)
    assert list(loaded) == ["train", "validation"]
    assert loaded["train"].features == SST2.features
    assert loaded["train"].to_list() == ROWS
    write(tmp_path / "reference" / "train.jsonl", ROWS)
    write(tmp_path / "reference" / "validation.jsonl", ROWS)
    assert sources.fingerprint(loaded) == sources.fingerprint(load(tmp_path / "reference"))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv"])
@pytest.mark.parametrize("name", CLASSIFICATION)
def test_every_task_of_classification_and_format(tmp_path, examples, name, suffix):
    task = registry.TASKS.get(name)
    rows = examples(name)
    for split in task.splits["test"]:
        write(tmp_path / task.name / f"{split}.{suffix}", rows)
    loaded = load(tmp_path, task, splits=task.splits["test"])
    for split in task.splits["test"]:
        assert loaded[split].features == task.features
        expected = Dataset.from_list(rows, features=task.features).to_list()
        assert loaded[split].to_list() == expected


def test_tsv_has_no_quoting(tmp_path):
    write(tmp_path / "train.tsv", ROWS)
    write(tmp_path / "validation.tsv", ROWS)
    assert load(tmp_path)["train"]["sentence"][:] == ['a "quoted, word', "dull ", "Zoë's naïve story"]


def test_the_hubs_numbered_parquet_shards(tmp_path):
    for number in (0, 1):
        write(tmp_path / f"train-0000{number}-of-00002.parquet", [{**ROWS[number], "idx": number}])
    write(tmp_path / "validation-00000-of-00001.parquet", ROWS)
    assert load(tmp_path)["train"].to_list() == ROWS[:2]


def test_any_file_can_be_predicted_on(tmp_path):
    write(tmp_path / "mine.csv", [{"sentence": "fine"}])
    data = sources.load_file(SST2, tmp_path / "mine.csv")
    assert data.to_list() == [{"sentence": "fine", "label": -1, "idx": 0}]
    with pytest.raises(UserError, match=r"mine\.txt: unknown format '\.txt'"):
        sources.load_file(SST2, tmp_path / "mine.txt")
    with pytest.raises(UserError, match=r"none\.csv: cannot be read: No such file"):
        sources.load_file(SST2, tmp_path / "none.csv")


# What can be wrong


def test_missing_folder(folder):
    message = complaint(folder.parent / (folder.name + "x"))
    assert "there is no folder" in message and f"Did you mean '{folder.name}'?" in message


def test_file_instead_of_folder(folder):
    assert "is a file; expected the folder" in complaint(folder / "train.jsonl")


def test_unreadable_folder(folder, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert "cannot be read: Permission denied" in complaint(folder)


def test_no_folder_given():
    with pytest.raises(UserError, match=r"data\.dir is not set"):
        sources.load(SST2, source="disk")


def test_no_split_file(tmp_path):
    (tmp_path / "training.txt").touch()
    message = complaint(tmp_path)
    assert "no split file of glue/sst2" in message
    assert "train with .parquet, .jsonl, .json, .csv or .tsv" in message and "holds training.txt" in message


def test_one_split_missing(folder):
    (folder / "validation.jsonl").unlink()
    message = complaint(folder)
    assert "no validation split of glue/sst2" in message and "found test.jsonl, train.jsonl" in message


def test_missing_test_split_is_an_error_only_if_asked_for(folder):
    (folder / "test.jsonl").unlink()
    assert list(load(folder)) == ["train", "validation"]
    assert "no test split" in complaint(folder, splits=["test"])


def test_unknown_split(folder):
    assert "no split 'validaton'. Did you mean 'validation'?" in complaint(folder, splits=["validaton"])


def test_two_files_for_one_split(folder):
    write(folder / "dev.csv", ROWS)
    message = complaint(folder)
    assert "dev.csv, validation.jsonl all could be the validation split" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sentence,label\nfine,1\ndull,0,9\n", "row 2 (line 3) has 3 fields; expected 2: sentence, label"),
        ("sentence,label\nfine,1\ndull\n", "row 2 (line 3) has 1 fields; expected 2: sentence, label"),
        ('sentence,label\nfine,1\n"dull,0\nbad,0\n', "row 2 (line 3) is broken: unexpected end of data"),
        ('sentence,label\n"a"b,1\n', "row 1 (line 2) is broken"),
        ("sentence,sentence\na,1\n", "a column occurs twice in the header"),
    ],
)
def test_broken_csv_row(folder, text, expected):
    (folder / "train.jsonl").unlink()
    (folder / "train.csv").write_text(text)
    assert expected in complaint(folder)


def test_broken_tsv_row(folder):
    (folder / "train.jsonl").unlink()
    (folder / "train.tsv").write_text('sentence\tlabel\n"fine\t1\nno label\n')
    assert "train.tsv: row 2 (line 3) has 1 fields; expected 2" in complaint(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"sentence": "a", "label": 1}\n{"sentence": "b"\n', "line 2 is not JSON"),
        ('{"sentence": "a", "label": 1}\n[1, 2]\n', "row 2 is a JSON list; expected an object"),
        ('[{"sentence": "a",\n "label"}]', "line 2 is not JSON"),
    ],
)
def test_broken_json(folder, text, expected):
    (folder / "train.jsonl").write_text(text)
    assert f"train.jsonl: {expected}" in complaint(folder)


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_key_that_occurs_twice(folder, suffix):
    (folder / "train.jsonl").unlink()
    path = folder / f"train.{suffix}"
    path.write_text('{"sentence": "a", "label": 1}\n{"sentence": "b", "label": 1, "label": 0}\n')
    assert f"train.{suffix}: line 2 is not readable JSON: the key 'label' occurs twice" in complaint(folder)
    path.write_text('[{"sentence": "a", "label": 1, "label": 0}]')
    assert f"train.{suffix}: not readable JSON: the key 'label' occurs twice" in complaint(folder)


def test_a_key_that_occurs_twice_in_a_cell(tmp_path, examples):
    task = registry.TASKS.get("superglue/multirc")
    row = {**examples(task.id)[0], "idx": '{"paragraph": 1, "question": 2, "answer": 3, "answer": 4}'}
    write(tmp_path / "train.csv", [row])
    assert "row 1: column 'idx' is" in complaint(tmp_path, task, splits=["train"])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train-00000-of-00003", "train-00002-of-00003"], "expected numbers 0 to 2 of 3"),
        (["train-00001-of-00002"], "expected numbers 0 to 1 of 2"),
        (
            ["train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"],
            "expected numbers 0 to 0 of 1",
        ),
    ],
)
def test_shards_that_are_not_all_there(tmp_path, names, expected):
    for name in names:
        write(tmp_path / f"{name}.parquet", ROWS)
    message = complaint(tmp_path, splits=["train"])
    assert expected in message and f"found {', '.join(f'{name}.parquet' for name in names)}" in message


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    for number in range(11):
        write(tmp_path / f"train-{number}-of-11.parquet", [{**ROWS[0], "idx": number}])
    assert load(tmp_path, splits=["train"])["train"]["idx"][:] == list(range(11))


def test_shards_of_other_columns(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", ROWS)
    write(tmp_path / "train-00001-of-00002.parquet", [{"sentence": "a", "idx": 3}])
    message = complaint(tmp_path, splits=["train"])
    assert (
        "train-00001-of-00002.parquet: its columns are sentence, idx; expected sentence, label, idx"
        in message
    )


@pytest.mark.parametrize("columns", [["label", "sentence", "idx"], ["idx", "label", "sentence"]])
def test_shards_may_order_their_columns_differently(tmp_path, columns):
    write(tmp_path / "train-00000-of-00002.parquet", ROWS[:1])
    write(tmp_path / "train-00001-of-00002.parquet", [{c: ROWS[1][c] for c in columns}])
    assert load(tmp_path, splits=["train"])["train"].to_list() == ROWS[:2]


def test_wrong_nesting(tmp_path):
    write(tmp_path / "test.jsonl", [{"idx": 0, "passage": {"text": "a", "question": []}}])
    message = complaint(tmp_path, registry.TASKS.get("superglue/multirc"), splits=["test"])
    assert (
        "row 1 has neither the columns paragraph, question, answer, idx nor the nesting of MultiRC's"
        in message
    )


def test_undecodable_file(folder):
    (folder / "train.jsonl").write_bytes(
        b'{"sentence": "a", "label": 1}\n{"sentence": "caf\xe9", "label": 1}\n'
    )
    assert "train.jsonl: line 2 holds byte 0xe9, which is not UTF-8" in complaint(folder)


@pytest.mark.parametrize("damage", ["cut", "rubbish", "nothing"])
def test_corrupt_parquet(folder, damage):
    (folder / "train.jsonl").unlink()
    path = folder / "train.parquet"
    write(path, ROWS * 100)
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "rubbish": b"PAR1" + b"x" * 90, "nothing": b""}[damage])
    assert "train.parquet: not a readable parquet file" in complaint(folder)


# columns, checked without reading rows: validate says the same as a run

FORMATS = ("parquet", "jsonl", "csv", "tsv")


def said(folder: Path, task: Any = SST2, **serves: str) -> str:
    """Return what is wrong with the headers, or the empty text."""
    try:
        check_headers(task, folder, serves)
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
