"""SQuAD's two scripts, by hand and by an independent version of their rules; MAP and MRR by scikit-learn and a loop."""

import re
import string

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from camex_ft.tasks.answer_metrics import RankedAnswers, SquadAnswers, SquadAnswersOrNone

EXACT = 1e-12  # the same formulas in float64


def v1(prediction, *golds):
    return SquadAnswers().compute(predictions=[prediction], references=[list(golds)])


def v2(prediction, *golds):
    scores = SquadAnswersOrNone().compute(predictions=[prediction], references=[list(golds)])
    return scores["exact_match"], scores["f1"]


# -- SQuAD ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1"),
    [
        ("the Eiffel Tower!", ["Eiffel tower"], 1, 1),
        ("a  an\tthe cat", ["cat"], 1, 1),
        ("theatre", ["the atre"], 0, 0),  # articles are whole words
        ("anthem", ["them"], 0, 0),
        ("don't", ["dont"], 1, 1),  # punctuation goes without leaving a blank
        ("rock-n-roll", ["rock n roll"], 0, 0),
        ("1,000", ["1000"], 1, 1),
        ("a.", ["the"], 1, 0),  # both empty once normalised: equal, without a word in common
        ("", ["."], 1, 0),
        ("", ["Rome"], 0, 0),
        ("Zürich", ["ZÜRICH"], 1, 1),  # lower case in unicode
        ("Zurich", ["Zürich"], 0, 0),
        ("“Rome”", ["Rome"], 0, 0),  # only ASCII punctuation goes
        ("in\u00a0Rome", ["in Rome"], 1, 1),  # every unicode blank is one
        ("in Rome in", ["in Rome"], 0, 0.8),  # bags: precision 2/3, recall 1
        ("Rome", ["Paris", "old Rome", "Rome of old"], 0, 2 / 3),  # the best gold answer by f1
        ("Rome", ["old Rome", "Rome"], 1, 1),
    ],
)
def test_version_1_by_hand(prediction, golds, exact, f1):
    assert v1(prediction, *golds) == {"exact_match": exact, "f1": pytest.approx(f1, abs=EXACT)}


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1"),
    [
        ("", [], 1, 1),
        ("Rome", [], 0, 0),
        ("", ["Rome"], 0, 0),
        ("the", [], 1, 1),  # nothing is left of it
        ("", ["the", "."], 1, 1),  # gold answers of which nothing is left do not count
        ("", ["the", "Rome"], 0, 0),
        ("Rome", ["the", "Rome"], 1, 1),
        ("in Rome in", ["in Rome"], 0, 0.8),
    ],
)
def test_version_2_by_hand(prediction, golds, exact, f1):
    assert v2(prediction, *golds) == (exact, pytest.approx(f1, abs=EXACT))


def test_the_two_versions_differ_in_f1_of_nothing():
    assert v1("", "the") == {"exact_match": 1, "f1": 0}
    assert v2("", "the") == (1, 1)


def test_parts_are_by_whether_there_are_gold_answers():
    scores = SquadAnswersOrNone().compute(
        predictions=["Rome", "", "old Rome", "x", ""],
        references=[["Rome"], ["Rome"], ["Rome"], [], []],
    )
    assert scores["exact_match"] == pytest.approx(2 / 5)
    assert scores["has_answer_exact_match"] == pytest.approx(1 / 3)
    assert scores["has_answer_f1"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert scores["no_answer_exact_match"] == scores["no_answer_f1"] == 0.5
    assert scores["f1"] == pytest.approx((1 + 2 / 3 + 1) / 5)


def test_a_part_without_questions_is_left_out():
    only = SquadAnswersOrNone().compute(predictions=["Rome"], references=[["Rome"]])
    assert only == {"exact_match": 1, "f1": 1, "has_answer_exact_match": 1, "has_answer_f1": 1}


def test_a_gold_answer_of_an_article_is_still_a_question_with_an_answer():
    scores = SquadAnswersOrNone().compute(predictions=[""], references=[["the"]])
    assert scores["has_answer_exact_match"] == 1
    assert "no_answer_f1" not in scores


def cleaned(text):
    """The scripts' normalising, character by character and word by word."""
    kept = "".join(" " if c.isspace() else c for c in text.lower() if c not in set(string.punctuation))
    return [word for word in re.split(r"[ ]+", kept) if word and word not in {"a", "an", "the"}]


def overlap(one, other):
    left, shared = list(other), 0
    for word in one:
        if word in left:
            left.remove(word)
            shared += 1
    if shared == 0:
        return 0.0
    precision, recall = shared / len(one), shared / len(other)
    return 2 * precision * recall / (precision + recall)


WORDS = st.lists(
    st.sampled_from(["the", "A", "an", "Rome", "rome,", "old", "U.S.", "-", "é", "É", "Rome", " ", "\t"]),
    max_size=5,
).map(" ".join)
QUESTIONS = st.lists(st.tuples(WORDS, st.lists(WORDS, max_size=3)), min_size=1, max_size=8)


@given(QUESTIONS)
@settings(max_examples=200, deadline=None)
def test_version_1_agrees_with_an_independent_one_to_the_last_digit(rows):
    exact = [max((float(cleaned(p) == cleaned(g)) for g in golds), default=0.0) for p, golds in rows]
    f1 = [max((overlap(cleaned(p), cleaned(g)) for g in golds), default=0.0) for p, golds in rows]
    found = SquadAnswers().compute(predictions=[p for p, _ in rows], references=[g for _, g in rows])
    assert found == {"exact_match": sum(exact) / len(rows), "f1": sum(f1) / len(rows)}


@given(QUESTIONS)
@settings(max_examples=200, deadline=None)
def test_version_2_agrees_with_an_independent_one_to_the_last_digit(rows):
    def f1(prediction, gold):
        one, other = cleaned(prediction), cleaned(gold)
        return overlap(one, other) if one and other else float(one == other)

    real = [[g for g in golds if cleaned(g)] or [""] for _, golds in rows]
    exact = [
        max(float(cleaned(p) == cleaned(g)) for g in golds) for (p, _), golds in zip(rows, real, strict=True)
    ]
    both = [max(f1(p, g) for g in golds) for (p, _), golds in zip(rows, real, strict=True)]
    found = SquadAnswersOrNone().compute(predictions=[p for p, _ in rows], references=[g for _, g in rows])
    assert (found["exact_match"], found["f1"]) == (sum(exact) / len(rows), sum(both) / len(rows))
    for part, wanted in (("has_answer", True), ("no_answer", False)):
        some = [i for i, (_, golds) in enumerate(rows) if bool(golds) is wanted]
        assert (f"{part}_f1" in found) == bool(some)
        if some:
            assert found[f"{part}_exact_match"] == sum(exact[i] for i in some) / len(some)
            assert found[f"{part}_f1"] == sum(both[i] for i in some) / len(some)


# -- WikiQA -----------------------------------------------------------------------------------------------------------

RANKED = st.lists(
    st.tuples(st.integers(-3, 3), st.integers(0, 1), st.integers(0, 4)), min_size=1, max_size=40
)


def rank(rows):
    scores, labels, questions = zip(*rows, strict=True)
    return RankedAnswers().compute(
        predictions=[float(s) for s in scores], references=labels, groups=[str(q) for q in questions]
    )


def by_hand(rows):
    """AP and RR of each question with a right sentence, in a plain loop; wrong ones first among equals."""
    found = {}
    for question in {q for _, _, q in rows}:
        own = sorted((-score, label) for score, label, q in rows if q == question)
        hits, precisions, first = 0, [], None
        for place, (_, label) in enumerate(own, start=1):
            if label == 1:
                hits += 1
                precisions.append(hits / place)
                first = first or place
        if precisions:
            found[question] = sum(precisions) / len(precisions), 1 / first
    return found


def test_by_hand():
    # question 0: right at places 2 and 3; question 1: right at 1; question 2 has no right sentence and does not count
    rows = [(3, 0, 0), (2, 1, 0), (1, 1, 0), (1, 1, 1), (-1, 0, 1), (5, 0, 2)]
    scores = rank(rows)
    assert scores["map"] == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1) / 2)
    assert scores["mrr"] == pytest.approx((1 / 2 + 1) / 2)
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["f1"] == pytest.approx(2 * 3 / (2 * 3 + 2))


@given(RANKED)
@settings(max_examples=100, deadline=None)
def test_map_and_mrr_agree_with_a_plain_loop(rows):
    scores, expected = rank(rows), by_hand(rows)
    assert ("map" in scores) == ("mrr" in scores) == bool(expected)
    if expected:
        assert scores["map"] == pytest.approx(np.mean([ap for ap, _ in expected.values()]), abs=EXACT)
        assert scores["mrr"] == pytest.approx(np.mean([rr for _, rr in expected.values()]), abs=EXACT)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4)), min_size=2, max_size=30), st.randoms())
@settings(max_examples=100, deadline=None)
def test_without_ties_map_is_scikit_learns_label_ranking_average_precision(pairs, random):
    scores = random.sample(range(100), len(pairs))
    rows = [(score, *pair) for score, pair in zip(scores, pairs, strict=True)]
    own = []
    for question in {q for _, q in pairs}:
        labels = [label for _, label, q in rows if q == question]
        if any(labels):
            values = [score for score, _, q in rows if q == question]
            own.append(sk.label_ranking_average_precision_score([labels], [values]))
    assume(own)
    assert rank(rows)["map"] == pytest.approx(np.mean(own), abs=EXACT)


@given(RANKED)
@settings(max_examples=50, deadline=None)
def test_a_constant_score_ranks_as_badly_as_can_be(rows):
    assume(by_hand(rows))
    worst = rank([(-label, label, question) for _, label, question in rows])
    constant = rank([(0, label, question) for _, label, question in rows])
    assert (constant["map"], constant["mrr"]) == (worst["map"], worst["mrr"])
    assert constant["map"] <= rank(rows)["map"] + EXACT
    assert constant["f1"] == 0  # a score of 0 is no


def test_without_a_right_sentence_there_is_no_ranking():
    assert rank([(1, 0, 0), (-1, 0, 1)]) == {"accuracy": 0.5, "f1": 0.0}
