"""COPA, MultiRC and ReCoRD: candidates as rows, decisions over groups."""

import numpy as np
import pytest

from camex_ft.tasks.superglue_candidates import plain
from camex_ft.utils import registry


def margins(values):
    """Return logits whose difference for class 1 is `values`, with an offset that must not matter."""
    values = np.asarray(values, dtype=float)
    offset = 10.0 * np.arange(len(values))
    return np.stack([offset, offset + values], axis=1)


def test_copa_puts_the_question_word_into_the_text(rows):
    made = rows("superglue/copa")
    assert made["text"][:2] == ["It rained. What was the effect?"] * 2
    assert made["text"][2] == "I got wet. What was the cause?"
    assert made["text_pair"][:] == ["I got wet.", "I ate.", "I ran.", "I ate."]
    assert made["label"][:] == [1, 0, 0, 1]  # choice1 of the first, choice2 of the second
    assert made["group"][:] == ["0", "0", "1", "1"]


def test_copa_chooses_the_greater_margin_of_each_pair(rows):
    task, made = registry.TASKS.get("superglue/copa"), rows("superglue/copa")
    assert task.predict(margins([0.1, 0.2, -5, -6]), made) == [1, 0]
    assert task.predict(margins([1, 1, 2, 2]), made) == [0, 0]  # ties go to the first choice
    assert task.metrics(margins([3, -3, 2, 9]), made) == {"accuracy": 1.0}
    assert task.metrics(margins([3, 4, 2, 9]), made) == {"accuracy": 0.5}


def test_copa_choices_stay_with_their_rows_when_shuffled(rows):
    task, made = registry.TASKS.get("superglue/copa"), rows("superglue/copa").select([3, 1, 0, 2])
    # groups in order of first occurrence: example 1, then example 0
    assert task.predict(margins([5, -1, 1, 0]), made) == [1, 0]
    assert task.metrics(margins([5, -1, 1, 0]), made) == {"accuracy": 1.0}


def test_copa_withheld_labels_stay_withheld(rows):
    assert rows("superglue/copa", label=-1)["label"][:2] == [-1, -1]


def test_multirc_groups_answers_by_question(rows):
    made = rows("superglue/multirc")
    assert made["text"][0] == "Ann has a cat."
    assert made["text_pair"][:] == ["Who has a cat? Bob", "Who has a cat? Ann"]
    assert made["group"][:] == ["3-5", "3-5"]
    other = rows("superglue/multirc", idx={"paragraph": 3, "question": 6, "answer": 0})
    assert other["group"][:] == ["3-6", "3-5"]


def test_multirc_metrics(rows):
    task, made = registry.TASKS.get("superglue/multirc"), rows("superglue/multirc")
    scores = task.metrics(margins([1, 1]), made)
    assert scores == {"f1_answers": pytest.approx(2 / 3), "exact_match": 0.0, "average": pytest.approx(1 / 3)}


def test_record_fills_the_gap_with_every_entity(rows):
    made = rows("superglue/record")
    assert made["text_pair"][:3] == ["Ann is hot.", "Bob is hot.", "Rome is hot."]
    assert made["text_pair"][4] == "It was Bob who sang"
    assert made["label"][:] == [0, 0, 1, 0, 1, 0]
    assert made["candidate"][:3] == ["Ann", "Bob", "Rome"]
    assert made["group"][:] == ["0-4"] * 3 + ["0-9"] * 3
    assert made["answers"][0] == ["Rome"]


def test_record_highlights_become_sentences():
    assert plain("Ann met Bob.\n@highlight\nBob sang\n@highlight\nRome was hot!") == (
        "Ann met Bob. Bob sang. Rome was hot!"
    )
    assert plain("no highlight") == "no highlight."


def test_record_predicts_a_text_and_takes_the_best_gold(rows):
    task = registry.TASKS.get("superglue/record")
    made = rows(
        "superglue/record", entities=["Ann", "Eternal City", "the Rome"], answers=["Rome", "Eternal City"]
    )
    assert made["label"][:3] == [0, 1, 0]
    logits = margins([0, 1, 2, 0, 9, 1])
    assert task.predict(logits, made) == ["the Rome", "Bob"]
    # "the Rome" is not among the answers as it stands, but equals one once normalised
    assert task.metrics(logits, made) == {"f1": 1.0, "exact_match": 1.0, "average": 1.0}
    wrong = margins([3, 1, 2, 0, 9, 1])
    assert task.metrics(wrong, made)["exact_match"] == 0.5


def test_record_without_answers_is_withheld(rows):
    assert rows("superglue/record", answers=[])["label"][:3] == [-1, -1, -1]
