"""Labels in every spelling, and one message for every column, label or value that does not fit."""

from dataclasses import replace
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from camex_ft.data.checks import to_dataset
from camex_ft.tasks.base import Task
from camex_ft.utils import registry
from camex_ft.utils.errors import UserError
from tests.helpers.task_files import ROWS, SST2, complaint, load, write
from tests.helpers.task_kinds import of_kind


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


LABELLED = [name for name in of_kind(Task) if "label" in registry.TASKS.get(name).features]
FALSE_AND_TRUE = ["superglue/boolq", "superglue/multirc", "superglue/wic", "superglue/wsc"]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", LABELLED)
def test_a_boolean_is_a_label_only_where_the_classes_are_false_and_true(name, split, examples):
    task = registry.TASKS.get(name)
    texts = ["question_id", "question", "document_title", "answer"]
    rows = [dict.fromkeys(texts, "a") | {"label": 0}] * 2 if name == "qa/wikiqa" else examples(name)
    columns = {column: [row[column] for row in rows] for column in rows[0]} | {"label": [0, True]}
    split = {"train": task.splits["train"], "test": task.splits["test"][0]}[split]
    if name in FALSE_AND_TRUE:
        assert to_dataset(columns, task, split, "here")["label"][:] == [0, 1]
        return
    with pytest.raises(UserError, match="here: row 2: column 'label' is True; expected"):
        to_dataset(columns, task, split, "here")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv", "tsv"])
@pytest.mark.parametrize("name", ["glue/rte", "glue/stsb", "superglue/rte"])
def test_a_boolean_label_is_refused_in_every_format(name, suffix, tmp_path, examples):
    rows = [{**row, "label": True} for row in examples(name)]
    write(tmp_path / f"train.{suffix}", rows)
    assert f"train.{suffix}: row 1: column 'label' is" in complaint(
        tmp_path, registry.TASKS.get(name), splits=["train"]
    )


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv", "tsv"])
def test_booleans_are_the_classes_false_and_true_in_every_format(suffix, tmp_path, examples):
    rows = [
        {**row, "label": label} for row, label in zip(examples("superglue/boolq"), (True, False), strict=True)
    ]
    write(tmp_path / f"train.{suffix}", rows)
    loaded = load(tmp_path, registry.TASKS.get("superglue/boolq"), splits=["train"])
    assert loaded["train"]["label"][:] == [1, 0]


@pytest.mark.parametrize("label", [1, 1.0, "1", "1.0", " 1 ", Decimal(1), "Positive"])
def test_every_way_to_write_a_class(label):
    columns = {"sentence": ["a"], "label": [label]}
    assert to_dataset(columns, SST2, "train", "here")["label"][:] == [1]


@pytest.mark.parametrize("label", ["1_0", "0_1", b"1", 2**63, -(2**63) - 1, 2**70, "1e999999999", [1], "٢"])
def test_what_python_would_take_for_a_class_is_refused(label):
    with pytest.raises(UserError, match="here: row 1: column 'label' is"):
        to_dataset({"sentence": ["a"], "label": [label]}, SST2, "train", "here")


@pytest.mark.parametrize("label", [3, 3.0, "3", "3.0"])
def test_classes_named_by_numbers_go_by_their_names(label):
    stars = ClassLabel(names=["1", "2", "3"])
    task = replace(SST2, features=Features({**SST2.features, "label": stars}))
    assert to_dataset({"sentence": ["a"], "label": [label]}, task, "train", "here")["label"][:] == [2]


@pytest.mark.parametrize("label", [float("inf"), "nan", 1e39, False, "-Infinity"])
def test_a_regression_without_limits_takes_finite_numbers_alone(label):
    task = replace(SST2, features=Features({**SST2.features, "label": Value("float32")}))
    with pytest.raises(UserError, match=r"row 1: column .label. is .*; expected a finite number"):
        to_dataset({"sentence": ["a"], "label": [label]}, task, "train", "here")


@pytest.mark.parametrize(
    ("idx", "expected"),
    [
        (True, "a whole number"),
        ("1_0", "a whole number"),
        (0.5, "a whole number"),
        (float("nan"), "a whole number"),
        (None, "a whole number"),
        (2**31, "a whole number that int32 holds"),
        (2**70, "a whole number that int32 holds"),
    ],
)
def test_a_number_of_a_row_is_a_whole_number(idx, expected):
    with pytest.raises(UserError, match=f"row 1: column 'idx' is .*; expected {expected}$"):
        to_dataset({"sentence": ["a"], "label": [1], "idx": [idx]}, SST2, "train", "here")


def test_where_an_answer_starts_is_no_boolean(tmp_path):
    answers = {"text": ["a"], "answer_start": [False]}
    write(
        tmp_path / "train.jsonl",
        [{"id": "1", "title": "", "context": "a", "question": "b", "answers": answers}],
    )
    message = complaint(tmp_path, registry.TASKS.get("qa/squad"), splits=["train"])
    assert "row 1: column 'answers' is" in message and "expected a whole number" in message


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


def test_a_missing_column_is_named_as_the_benchmark_names_it_too():
    columns = {"sentence1": ["a"], "sentence2": ["b"]}
    with pytest.raises(UserError, match=r"glue/stsb needs the column label \(or score\); found sentence1"):
        to_dataset(columns, registry.TASKS.get("glue/stsb"), "train", "f.tsv")


def test_multirc_needs_its_question_numbers(tmp_path, examples):
    rows = [{k: v for k, v in row.items() if k != "idx"} for row in examples("superglue/multirc")]
    write(tmp_path / "test.csv", rows)
    message = complaint(tmp_path, registry.TASKS.get("superglue/multirc"), splits=["test"])
    assert "test.csv: superglue/multirc needs the column idx" in message


@pytest.mark.parametrize("label", [2, -1, 7.0, "good", "", None, 0.5, True])
def test_label_out_of_range(folder, label):
    write(folder / "train.jsonl", [ROWS[0], {**ROWS[1], "label": label}])
    message = complaint(folder)
    assert "train.jsonl: row 2: column 'label' is" in message
    assert "expected 0 (negative), 1 (positive), or one of these names" in message


@pytest.mark.parametrize("label", [5.1, -0.5, float("nan"), float("inf"), "high", "1_0", None, True])
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
