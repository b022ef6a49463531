"""Metrics against scikit-learn and SciPy, and the values where those have none."""

import json
import math
import os
import re
import string
import warnings

import evaluate
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from camex_ft.tasks import metrics as m
from camex_ft.tasks.metrics import RankedAnswers, SquadAnswers, SquadAnswersOrNone

EXACT = 1e-12  # the same formulas in float64
METRICS = [m.Accuracy, m.AccuracyF1, m.AccuracyMacroF1, m.Matthews, m.Correlation]
METRICS += [m.QuestionF1, m.GenderParity, m.AnswerF1]


def pairs(classes, least=1):
    label = st.integers(0, classes - 1)
    return st.lists(st.tuples(label, label), min_size=least, max_size=40).map(
        lambda rows: tuple(zip(*rows, strict=True))
    )


def compute(metric, predictions, references, **columns):
    return metric().compute(predictions=list(predictions), references=list(references), **columns)


@given(pairs(2))
@settings(max_examples=30, deadline=None)
def test_binary_metrics_agree_with_scikit_learn(rows):
    predictions, labels = rows
    assert compute(m.Accuracy, predictions, labels)["accuracy"] == pytest.approx(
        np.mean(np.equal(*rows)), abs=EXACT
    )
    scores = compute(m.AccuracyF1, predictions, labels)
    assert scores["f1"] == pytest.approx(sk.f1_score(labels, predictions, zero_division=0), abs=EXACT)
    assert scores["accuracy"] == pytest.approx(sk.accuracy_score(labels, predictions), abs=EXACT)


@given(pairs(3))
@settings(max_examples=30, deadline=None)
def test_metrics_of_three_classes_agree_with_scikit_learn(rows):
    predictions, labels = rows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        macro = sk.f1_score(labels, predictions, average="macro")
        matthews = sk.matthews_corrcoef(labels, predictions)
    scores = compute(m.AccuracyMacroF1, predictions, labels)
    assert scores["f1_macro"] == pytest.approx(macro, abs=EXACT)
    assert scores["average"] == pytest.approx((scores["accuracy"] + macro) / 2, abs=EXACT)
    assert compute(m.Matthews, predictions, labels)["matthews"] == pytest.approx(matthews, abs=EXACT)


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 20)), min_size=2, max_size=40))
@settings(max_examples=30, deadline=None)
def test_correlations_agree_with_scipy_or_are_zero_for_constants(rows):
    predictions = [a / 7 for a, _ in rows]  # few values, so that there are ties
    labels = [b / 4 for _, b in rows]
    scores = compute(m.Correlation, predictions, labels)
    if len(set(predictions)) == 1 or len(set(labels)) == 1:
        assert scores == {"spearman": 0.0, "pearson": 0.0}
        return
    assert scores["spearman"] == pytest.approx(stats.spearmanr(predictions, labels).statistic, abs=EXACT)
    assert scores["pearson"] == pytest.approx(stats.pearsonr(predictions, labels).statistic, abs=EXACT)


@pytest.mark.parametrize("predictions", [[1, 1, 1, 1], [0, 0, 0, 0]])
def test_constant_predictions_are_worth_nothing(predictions):
    labels = [0, 1, 1, 0]
    assert compute(m.Matthews, predictions, labels)["matthews"] == 0
    assert compute(m.Correlation, predictions, labels)["spearman"] == 0


def test_one_class_only():
    assert compute(m.AccuracyF1, [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}
    assert compute(m.AccuracyMacroF1, [2, 2], [2, 2]) == {"accuracy": 1.0, "f1_macro": 1.0, "average": 1.0}
    assert compute(m.Matthews, [1, 1], [1, 1])["matthews"] == 0
    assert compute(m.Correlation, [3.0], [3.0]) == {"spearman": 0.0, "pearson": 0.0}


def test_nan_predictions_are_not_hidden():
    assert math.isnan(compute(m.Correlation, [math.nan, 1.0, 2.0], [1.0, 2.0, 3.0])["pearson"])


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 5)), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_question_metrics_agree_with_their_definition(rows):
    predictions, labels, questions = (list(column) for column in zip(*rows, strict=True))
    scores = compute(m.QuestionF1, predictions, labels, groups=[str(q) for q in questions])
    exact = np.mean([all(p == y for p, y, q in rows if q == question) for question in set(questions)])
    assert scores["exact_match"] == pytest.approx(exact, abs=EXACT)
    assert scores["f1_answers"] == pytest.approx(sk.f1_score(labels, predictions, zero_division=0), abs=EXACT)
    assert scores["average"] == pytest.approx((scores["exact_match"] + scores["f1_answers"]) / 2, abs=EXACT)


def test_exact_match_needs_every_answer_of_a_question():
    scores = compute(m.QuestionF1, [1, 0, 1, 1], [1, 0, 1, 0], groups=["a", "a", "b", "b"])
    assert scores["exact_match"] == 0.5


def test_gender_parity_counts_pairs_whose_predictions_agree():
    groups = ["a", "a", "b", "b", "c", "c"]
    scores = compute(m.GenderParity, [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0], groups=groups)
    assert scores == {"accuracy": pytest.approx(3 / 6), "gender_parity": pytest.approx(2 / 3)}


def test_gender_parity_is_left_out_where_there_is_no_pair():
    assert compute(m.GenderParity, [0, 1], [0, 1], groups=["a", "b"]) == {"accuracy": 1.0}
    lone = compute(m.GenderParity, [0, 1, 1], [0, 1, 1], groups=["a", "b", "b"])
    assert lone["gender_parity"] == 1.0  # the lone row has no part in it


@pytest.mark.parametrize(
    ("prediction", "gold", "exact", "f1"),
    [
        ("The Cat", "cat", 1, 1),
        ("a an the", "", 1, 0),  # equal once normalised, but they share no word
        ("U.S.", "US", 1, 1),
        ("us", "U S", 0, 0),  # punctuation leaves no blank, so U.S. is one word and "U S" two
        ("New York City", "New York", 0, 0.8),
        ("then", "the n", 0, 0),  # an article is a whole word
        ("York York", "York", 0, 2 / 3),  # bags of words, not sets
        ("Jean-Luc", "jeanluc", 1, 1),
        ("O’Neill", "ONeill", 0, 0),  # only ASCII punctuation goes
        ("  Obama \n", "Obama", 1, 1),
        ("Clinton", "Trump", 0, 0),
    ],
)
def test_answers_are_compared_as_squad_does(prediction, gold, exact, f1):
    scores = compute(m.AnswerF1, [prediction], [[gold]])
    assert scores == {
        "exact_match": exact,
        "f1": pytest.approx(f1),
        "average": pytest.approx((exact + f1) / 2),
    }


def test_the_best_gold_answer_counts():
    golds = [["Barack Obama", "Obama", "the president"], ["Rome"]]
    scores = compute(m.AnswerF1, ["Obama", "Paris"], golds)
    assert scores == {"f1": 0.5, "exact_match": 0.5, "average": 0.5}
    assert compute(m.AnswerF1, ["Rome"], [[]])["f1"] == 0


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_are_evaluate_metrics_that_write_nothing(metric, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    columns = {"predictions": [1, 0], "references": [1, 1], "groups": ["a", "a"]}
    if metric is m.AnswerF1:
        columns = {"predictions": ["a b", "c"], "references": [["b"], ["c", "d"]]}
    columns = {name: columns[name] for name in metric.inputs}
    entry = metric()
    assert isinstance(entry, evaluate.Metric)
    whole = entry.compute(**columns)
    entry.add_batch(**{name: values[:1] for name, values in columns.items()})
    entry.add_batch(**{name: values[1:] for name, values in columns.items()})
    assert entry.compute() == whole
    assert json.loads(json.dumps(whole)) == whole  # plain floats, fit for a record
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("metric", METRICS)
def test_no_rows_is_an_error(metric):
    with pytest.raises(ValueError, match="at least one row"):
        metric().compute(**{name: [] for name in metric.inputs})


def test_members_keep_the_order_of_first_occurrence():
    assert list(m.members_of(["b", "a", "b"]).items()) == [("b", [0, 2]), ("a", [1])]


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
