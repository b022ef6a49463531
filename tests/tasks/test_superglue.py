"""SuperGLUE: schemas, primary metrics, plain tasks' texts, submission files."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, List, Value
from hypothesis import given
from hypothesis import strategies as st

from camex_ft.tasks.superglue import mark, span_of
from camex_ft.utils import registry

TEXT, NUMBER = Value("string"), Value("int32")
BOOLEAN = ClassLabel(names=["False", "True"])
ENTAILMENT = ClassLabel(names=["entailment", "not_entailment"])
# Columns and types as published, and the primary metric: the mean where the paper reports two.
SCHEMA = {
    "boolq": ({"question": TEXT, "passage": TEXT, "idx": NUMBER, "label": BOOLEAN}, "accuracy"),
    "cb": (
        {
            "premise": TEXT,
            "hypothesis": TEXT,
            "idx": NUMBER,
            "label": ClassLabel(names=["entailment", "contradiction", "neutral"]),
        },
        "average",
    ),
    "copa": (
        {
            **dict.fromkeys(["premise", "choice1", "choice2", "question"], TEXT),
            "idx": NUMBER,
            "label": ClassLabel(names=["choice1", "choice2"]),
        },
        "accuracy",
    ),
    "multirc": (
        {
            **dict.fromkeys(["paragraph", "question", "answer"], TEXT),
            "idx": dict.fromkeys(["paragraph", "question", "answer"], NUMBER),
            "label": BOOLEAN,
        },
        "average",
    ),
    "record": (
        {
            "passage": TEXT,
            "query": TEXT,
            "entities": List(TEXT),
            "answers": List(TEXT),
            "idx": dict.fromkeys(["passage", "query"], NUMBER),
        },
        "average",
    ),
    "rte": ({"premise": TEXT, "hypothesis": TEXT, "idx": NUMBER, "label": ENTAILMENT}, "accuracy"),
    "wic": (
        {
            **dict.fromkeys(["word", "sentence1", "sentence2"], TEXT),
            **dict.fromkeys(["start1", "start2", "end1", "end2"], NUMBER),
            "idx": NUMBER,
            "label": BOOLEAN,
        },
        "accuracy",
    ),
    "wsc": (
        {
            "text": TEXT,
            "span1_index": NUMBER,
            "span2_index": NUMBER,
            "span1_text": TEXT,
            "span2_text": TEXT,
            "idx": NUMBER,
            "label": BOOLEAN,
        },
        "accuracy",
    ),
    "axb": ({"sentence1": TEXT, "sentence2": TEXT, "idx": NUMBER, "label": ENTAILMENT}, "matthews"),
    "axg": ({"premise": TEXT, "hypothesis": TEXT, "idx": NUMBER, "label": ENTAILMENT}, "accuracy"),
}


@pytest.mark.parametrize("name", SCHEMA)
def test_schema_is_the_hubs(name):
    task = registry.TASKS.get(f"superglue/{name}")
    features, primary = SCHEMA[name]
    assert dict(task.features) == features
    assert task.primary == primary


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("boolq", "passage one", "question one"),
        ("cb", "premise one", "hypothesis one"),
        ("rte", "premise one", "hypothesis one"),
        ("axb", "sentence1 one", "sentence2 one"),
        ("axg", "premise one", "hypothesis one"),
    ],
)
def test_texts_of_plain_tasks(name, first, second, rows):
    row = rows(f"superglue/{name}")[0]
    assert (row["text"], row["text_pair"], row["label"]) == (first, second, 0)


def test_winogender_pairs_are_neighbours(rows):
    assert rows("superglue/axg")["group"][:] == ["pair-0", "pair-0"]
    assert rows("superglue/axg", idx=2)["group"][:] == ["pair-1", "pair-0"]


def test_winogender_parity(rows):
    task, made = registry.TASKS.get("superglue/axg"), rows("superglue/axg")
    assert task.metrics(np.array([[1, 0], [1, 0]]), made) == {"accuracy": 0.5, "gender_parity": 1.0}
    assert task.metrics(np.array([[1, 0], [0, 1]]), made) == {"accuracy": 1.0, "gender_parity": 0.0}


@pytest.mark.parametrize(
    ("name", "predictions", "expected", "file"),
    [
        ("boolq", [0, 1], ["false", "true"], "BoolQ.jsonl"),
        ("cb", [1, 2], ["contradiction", "neutral"], "CB.jsonl"),
        ("copa", [0, 1], [0, 1], "COPA.jsonl"),
        ("rte", [0, 1], ["entailment", "not_entailment"], "RTE.jsonl"),
        ("wic", [0, 1], ["false", "true"], "WiC.jsonl"),
        ("wsc", [0, 1], ["False", "True"], "WSC.jsonl"),
        ("axb", [1, 0], ["not_entailment", "entailment"], "AX-b.jsonl"),
        ("axg", [1, 0], ["not_entailment", "entailment"], "AX-g.jsonl"),
    ],
)
def test_submission_files(name, predictions, expected, file, rows, tmp_path):
    task = registry.TASKS.get(f"superglue/{name}")
    path = tmp_path / task.files["test"]
    task.submission(predictions, rows(f"superglue/{name}"), path)
    assert path.name == file
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"idx": idx, "label": label} for idx, label in enumerate(expected)]


def test_nested_submission_files(rows, tmp_path):
    multirc, record = registry.TASKS.get("superglue/multirc"), registry.TASKS.get("superglue/record")
    multirc.submission([0, 1], rows("superglue/multirc"), tmp_path / multirc.files["test"])
    answers = [{"idx": 7, "label": 0}, {"idx": 8, "label": 1}]
    expected = {"idx": 3, "passage": {"questions": [{"idx": 5, "answers": answers}]}}
    assert [json.loads(line) for line in (tmp_path / "MultiRC.jsonl").read_text().splitlines()] == [expected]
    record.submission(["Rome", "Zoë"], rows("superglue/record"), tmp_path / record.files["test"])
    lines = [json.loads(line) for line in (tmp_path / "ReCoRD.jsonl").read_text().splitlines()]
    assert lines == [{"idx": 4, "label": "Rome"}, {"idx": 9, "label": "Zoë"}]


def test_wic_marks_the_word_in_both_sentences(rows):
    row = rows("superglue/wic")[0]
    assert row["text"] == "The * bank * is shut."
    assert row["text_pair"] == "A river * bank *."
    assert [row["text"][a:b] for a, b in row["marked"]] == ["* bank *"]
    assert [row["text_pair"][a:b] for a, b in row["marked_pair"]] == ["* bank *"]


def test_wsc_marks_noun_and_pronoun(rows):
    row = rows("superglue/wsc")[0]
    assert row["text"] == "* Ann * told Eve that # she # won."
    assert row["text_pair"] is None
    assert [row["text"][a:b] for a, b in row["marked"]] == ["* Ann *", "# she #"]


def test_wsc_pronoun_before_noun(rows):
    row = rows("superglue/wsc", span1_index=4, span1_text="she", span2_index=0, span2_text="Ann")[0]
    assert row["text"] == "# Ann # told Eve that * she * won."
    assert [row["text"][a:b] for a, b in row["marked"]] == ["* she *", "# Ann #"]


@pytest.mark.parametrize(
    ("text", "index", "span", "found"),
    [
        ("Ann saw Mr. Moncrieff today", 2, "Mr. Moncrieff", "Mr. Moncrieff"),
        ("He met him.", 2, "him", "him"),  # punctuation is no part of the span
        ("Edward's hat", 0, "Edward", "Edward"),
        ("Her coat is old", 0, "her", "Her"),  # case differs
        ("the  big   dog barks", 1, "big dog", "big   dog"),  # blanks differ: as many words
        ("I like the dogs, really", 2, "the dog", "the dog"),
        ("They said theyscold", 2, "they scold", "theyscold"),  # beyond the text's end
        ("so it goes .", 3, "x", "."),
    ],
)
def test_spans_of_words(text, index, span, found):
    start, end = span_of(text, index, span)
    assert text[start:end] == found


spans = st.text(alphabet="ab *#.", min_size=1, max_size=30).flatmap(
    lambda text: st.tuples(
        st.just(text),
        st.lists(st.tuples(st.integers(0, len(text) - 1), st.integers(1, 5)), min_size=1, max_size=2),
    )
)


@given(spans)
def test_marks_add_only_themselves(drawn):
    text, starts = drawn
    places = [(start, min(start + length, len(text)), "@") for start, length in starts]
    marked, ranges = mark(text, places)
    assert marked.replace("@ ", "").replace(" @", "") == text
    for (start, end, _), (low, high) in zip(places, ranges, strict=True):
        piece = marked[low:high]
        assert piece.startswith("@ ") and piece.endswith(" @")
        assert piece.replace("@ ", "").replace(" @", "") == text[start:end]
