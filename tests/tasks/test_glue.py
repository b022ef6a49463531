"""GLUE: schemas, primary metrics, what the model reads, submission files."""

import pytest
from datasets import ClassLabel, Value

from camex_ft.utils import registry

ENTAILMENT = ["entailment", "not_entailment"]
NLI = ["entailment", "neutral", "contradiction"]
# Columns, label names and primary metric as published; the order of the label names is that of the ids.
SCHEMA = {
    "cola": (["sentence"], ["unacceptable", "acceptable"], "matthews"),
    "sst2": (["sentence"], ["negative", "positive"], "accuracy"),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"], "f1"),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"], "f1"),
    "stsb": (["sentence1", "sentence2"], None, "spearman"),
    "mnli": (["premise", "hypothesis"], NLI, "accuracy"),
    "qnli": (["question", "sentence"], ENTAILMENT, "accuracy"),
    "rte": (["sentence1", "sentence2"], ENTAILMENT, "accuracy"),
    "wnli": (["sentence1", "sentence2"], ENTAILMENT[::-1], "accuracy"),
    "ax": (["premise", "hypothesis"], NLI, "matthews"),
}


@pytest.mark.parametrize("name", SCHEMA)
def test_schema_is_the_hubs(name):
    task = registry.TASKS.get(f"glue/{name}")
    columns, labels, primary = SCHEMA[name]
    assert list(task.features) == [*columns, "label", "idx"]
    assert all(task.features[column] == Value("string") for column in columns)
    assert task.features["label"] == (ClassLabel(names=labels) if labels else Value("float32"))
    assert task.features["idx"] == Value("int32")
    assert task.primary == primary


@pytest.mark.parametrize("name", SCHEMA)
def test_texts_are_the_columns_as_they_stand(name, rows):
    made = rows(f"glue/{name}")
    columns = SCHEMA[name][0]
    assert made["text"][:] == [f"{columns[0]} one", f"{columns[0]} two"]
    pairs = [f"{columns[1]} one", f"{columns[1]} two"] if len(columns) == 2 else [None, None]
    assert made["text_pair"][:] == pairs
    assert made["group"][:] == ["0", "1"]


def test_mnli_has_two_validation_and_two_test_sets():
    splits = registry.TASKS.get("glue/mnli").splits
    assert splits["validation"] == ("validation_matched", "validation_mismatched")
    assert splits["test"] == ("test_matched", "test_mismatched")
    assert registry.TASKS.get("glue/mnli").files == {
        "test_matched": "MNLI-m.tsv",
        "test_mismatched": "MNLI-mm.tsv",
    }


@pytest.mark.parametrize(
    ("name", "predictions", "expected", "file"),
    [
        ("cola", [1, 0], ["1", "0"], "CoLA.tsv"),
        ("sst2", [1, 0], ["1", "0"], "SST-2.tsv"),
        ("mrpc", [1, 0], ["1", "0"], "MRPC.tsv"),
        ("qqp", [0, 1], ["0", "1"], "QQP.tsv"),
        ("wnli", [1, 0], ["1", "0"], "WNLI.tsv"),
        ("rte", [0, 1], ENTAILMENT, "RTE.tsv"),
        ("qnli", [1, 0], ENTAILMENT[::-1], "QNLI.tsv"),
        ("mnli", [2, 1], ["contradiction", "neutral"], "MNLI-m.tsv"),
        ("ax", [0, 2], ["entailment", "contradiction"], "AX.tsv"),
        ("stsb", [-0.2, 5.7], ["0.000", "5.000"], "STS-B.tsv"),
        ("stsb", [2.34567, 4.0], ["2.346", "4.000"], "STS-B.tsv"),
    ],
)
def test_submission_files(name, predictions, expected, file, rows, tmp_path):
    task = registry.TASKS.get(f"glue/{name}")
    path = tmp_path / "submission" / task.files[task.splits["test"][0]]
    task.submission(predictions, rows(f"glue/{name}"), path)
    assert path.name == file
    assert path.read_text().splitlines() == [
        "index\tprediction",
        *(f"{i}\t{v}" for i, v in enumerate(expected)),
    ]


def test_index_is_the_examples_own(rows, tmp_path):
    task = registry.TASKS.get("glue/sst2")
    task.submission([1, 1], rows("glue/sst2", idx=70), tmp_path / "a.tsv")
    assert (tmp_path / "a.tsv").read_text() == "index\tprediction\n70\t1\n1\t1\n"


def test_submissions_need_a_prediction_for_every_row(rows, tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        registry.TASKS.get("glue/sst2").submission([1], rows("glue/sst2"), tmp_path / "a.tsv")
