"""Metrics against scikit-learn and SciPy, and the values where those have none."""

import json
import math
import os
import warnings

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from camex_ft.tasks import metrics as m

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
