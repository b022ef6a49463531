"""Labels in every spelling, and one message for every column, label or value that does not fit."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from task_files import ROWS, complaint, load, write

from camex_ft import registry


def test_label_ids_follow_the_files_own_names(tmp_path):
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["positive", "negative"])})
    data = Dataset.from_list(
        [{"sentence": "good", "label": 0}, {"sentence": "bad", "label": 1}], features=features
    )
    data.to_parquet(tmp_path / "validation.parquet")
    assert load(tmp_path, splits=["validation"])["validation"]["label"][:] == [1, 0]


def test_labels_by_name_in_any_case_and_as_numbers(tmp_path):
    rows = [{"sentence": "a", "label": label} for label in ("positive", "NEGATIVE", "1", "0", "1.0")]
    write(tmp_path / "validation.csv", rows)
    assert load(tmp_path, splits=["validation"])["validation"]["label"][:] == [1, 0, 1, 0, 1]


def test_test_labels_may_be_missing_empty_or_minus_one(tmp_path):
    for labels in ([-1, -1], ["", ""], [-1.0, "nan"], [-1, 1]):
        write(tmp_path / "test.csv", [{"sentence": "a", "label": label} for label in labels])
        loaded = load(tmp_path, splits=["test"])["test"]["label"][:]
        assert loaded == [-1, 1 if labels == [-1, 1] else -1]
    write(tmp_path / "test.csv", [{"sentence": "a"}, {"sentence": "b"}])
    assert load(tmp_path, splits=["test"])["test"].to_list() == [
        {"sentence": "a", "label": -1, "idx": 0},
        {"sentence": "b", "label": -1, "idx": 1},
    ]


def test_first_rows(folder):
    loaded = load(folder, train_rows=2, eval_rows=1)
    assert {split: len(data) for split, data in loaded.items()} == {"train": 2, "validation": 1, "test": 3}
    assert loaded["train"].to_list() == ROWS[:2]
    assert len(load(folder, train_rows=99)["train"]) == 3


def test_missing_columns(folder):
    write(folder / "train.jsonl", [{"sentences": "a", "label": 1, "extra": 2}])
    message = complaint(folder)
    assert "train.jsonl: glue/sst2 needs the column sentence; found sentences, label, extra." in message
    assert "Did you mean 'sentences'?" in message


def test_missing_label_column(folder):
    write(folder / "validation.jsonl", [{"sentence": "a"}])
    assert "validation.jsonl: glue/sst2 needs the column label; found sentence" in complaint(folder)


def test_multirc_needs_its_question_numbers(tmp_path, examples):
    rows = [{k: v for k, v in row.items() if k != "idx"} for row in examples("superglue/multirc")]
    write(tmp_path / "test.csv", rows)
    message = complaint(tmp_path, registry.TASKS.get("superglue/multirc"), splits=["test"])
    assert "test.csv: superglue/multirc needs the column idx" in message


@pytest.mark.parametrize("label", [2, -1, 7.0, "good", "", None, 0.5, True])
def test_label_out_of_range(folder, label):
    write(folder / "train.jsonl", [ROWS[0], {**ROWS[1], "label": label}])
    if label is True:
        assert load(folder)["train"]["label"][:] == [1, 1]
        return
    message = complaint(folder)
    assert "train.jsonl: row 2: column 'label' is" in message
    assert "expected 0 (negative), 1 (positive), or one of these names" in message


@pytest.mark.parametrize("label", [5.1, -0.5, float("nan"), "high", None])
def test_regression_label_out_of_range(tmp_path, examples, label):
    rows = examples("glue/stsb")
    rows[1]["label"] = label
    write(tmp_path / "train.jsonl", rows)
    message = complaint(tmp_path, registry.TASKS.get("glue/stsb"), splits=["train"])
    assert "row 2: column 'label' is" in message and "expected a number from 0 to 5" in message


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv", "tsv"])
def test_empty_split(folder, suffix):
    (folder / "train.jsonl").unlink()
    path = folder / f"train.{suffix}"
    if suffix == "parquet":
        pq.write_table(
            pa.table({"sentence": pa.array([], pa.string()), "label": pa.array([], pa.int64())}), path
        )
    else:
        path.write_text(
            {"json": "[]", "jsonl": "\n"}.get(
                suffix, "sentence,label\n".replace(",", "\t" * (suffix == "tsv") or ",")
            )
        )
    assert f"train.{suffix}: the train split of glue/sst2 is empty" in complaint(folder)


def test_file_of_no_bytes(folder):
    (folder / "train.jsonl").unlink()
    (folder / "train.csv").touch()
    assert "is empty" in complaint(folder)


@pytest.mark.parametrize(("value", "shown"), [(None, "null"), (7, "7"), (["a"], "['a']")])
def test_text_that_is_none(folder, value, shown):
    write(folder / "train.jsonl", [*ROWS, {"sentence": value, "label": 1, "idx": 3}])
    assert f"train.jsonl: row 4: column 'sentence' is {shown}; expected a text" in complaint(folder)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("copa", {"question": "why"}, "column 'question' is 'why'; expected 'cause' or 'effect'"),
        ("wic", {"end1": 99}, "columns 'start1', 'end1' are 4, 99; expected 0 <= start < end <= 17"),
        ("wic", {"start2": 12}, "columns 'start2', 'end2' are 12, 12"),
        ("wic", {"start1": "x"}, "column 'start1' is 'x'; expected a whole number"),
        (
            "wsc",
            {"span2_index": 6},
            "column 'span2_index' is 6; expected the number of a word of 'text', 0 to 5",
        ),
        ("wsc", {"span1_index": None}, "column 'span1_index' is null; expected a whole number"),
        ("record", {"query": "no gap"}, "column 'query' has no '@placeholder'"),
        ("record", {"entities": []}, "column 'entities' is empty"),
        ("record", {"entities": "Rome"}, "column 'entities' is 'Rome'; expected JSON"),
        ("record", {"answers": []}, "column 'answers' is empty; expected at least one gold answer"),
        ("multirc", {"idx": {"paragraph": 1}}, "expected an object with paragraph, question, answer"),
    ],
)
def test_faults_of_single_examples(tmp_path, examples, name, changes, expected):
    rows = examples(f"superglue/{name}")
    rows[1].update(changes)
    write(tmp_path / "train.jsonl", rows)
    message = complaint(tmp_path, registry.TASKS.get(f"superglue/{name}"), splits=["train"])
    assert f"train.jsonl: row 2: {expected}" in message or (
        "row 2: column 'idx'" in message and expected in message
    )


def test_groups_need_different_numbers(tmp_path, examples):
    rows = examples("superglue/copa")
    rows[1]["idx"] = rows[0]["idx"]
    write(tmp_path / "train.jsonl", rows)
    message = complaint(tmp_path, registry.TASKS.get("superglue/copa"), splits=["train"])
    assert "idx 0 occurs twice" in message
