"""Metrics of the tasks as `evaluate.Metric` classes that need neither network nor cache folder.

``evaluate.load("glue")`` downloads a script; an instance of a class here does not. Values agree with scikit-learn and
SciPy except where those are undefined; the docstring of each class gives its value then. All are in [-1, 1] or [0, 1].
"""

from __future__ import annotations

import re
import string
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from datasets import Value
from scipy import stats
from sklearn import metrics as sk

Scores = dict[str, float]
Inputs = Mapping[str, Any]
INTEGERS: Inputs = {"predictions": Value("int64"), "references": Value("int64")}
GROUPED: Inputs = {**INTEGERS, "groups": Value("string")}
REALS: Inputs = {"predictions": Value("float64"), "references": Value("float64")}
RANKED: Inputs = {"predictions": Value("float64"), "references": Value("int64"), "groups": Value("string")}
TEXTS: Inputs = {"predictions": Value("string"), "references": datasets.List(Value("string"))}


class TaskMetric(evaluate.Metric):
    """Base of metrics in memory, which write no file: an unwritable home folder or a second process does no harm.

    Subclasses set `inputs` (the types of predictions, references and further columns) and implement `score`; their
    docstring becomes the metric's description.
    """

    inputs: Inputs = INTEGERS
    score: Callable[..., Scores]

    def __init__(self, **options: Any) -> None:
        super().__init__(keep_in_memory=True, cache_dir=tempfile.gettempdir(), **options)

    def _build_data_dir(self) -> str:
        return str(self._data_dir_root)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description=f"Takes {', '.join(self.inputs)}.",
            features=datasets.Features(dict(self.inputs)),
        )

    def _compute(self, **columns: Any) -> Scores:
        if len(columns["predictions"]) == 0:
            raise ValueError(f"{type(self).__name__} needs at least one row")
        return self.score(**columns)


class Accuracy(TaskMetric):
    """accuracy: the share of rows whose prediction is the label."""

    def score(self, *, predictions: Sequence[int], references: Sequence[int]) -> Scores:
        return {"accuracy": float(sk.accuracy_score(references, predictions))}


class AccuracyF1(TaskMetric):
    """accuracy and f1, the F1 of class 1; f1 is 0 where neither predictions nor labels hold class 1."""

    def score(self, *, predictions: Sequence[int], references: Sequence[int]) -> Scores:
        return {
            "accuracy": float(sk.accuracy_score(references, predictions)),
            "f1": float(sk.f1_score(references, predictions, average="binary", zero_division=0)),
        }


class AccuracyMacroF1(TaskMetric):
    """accuracy, f1_macro and their mean, average.

    f1_macro is the unweighted mean of the F1 of every class found in predictions or labels, as SuperGLUE computes it
    for CB; a class found in neither is left out.
    """

    def score(self, *, predictions: Sequence[int], references: Sequence[int]) -> Scores:
        accuracy = float(sk.accuracy_score(references, predictions))
        f1 = float(sk.f1_score(references, predictions, average="macro", zero_division=0))
        return {"accuracy": accuracy, "f1_macro": f1, "average": (accuracy + f1) / 2}


class Matthews(TaskMetric):
    """matthews (the correlation of predictions and labels, any number of classes) and accuracy.

    Constant predictions or constant labels have correlation 0, as in scikit-learn.
    """

    def score(self, *, predictions: Sequence[int], references: Sequence[int]) -> Scores:
        varied = len(set(predictions)) > 1 and len(set(references)) > 1
        return {
            "matthews": float(sk.matthews_corrcoef(references, predictions)) if varied else 0.0,
            "accuracy": float(sk.accuracy_score(references, predictions)),
        }


class Correlation(TaskMetric):
    """spearman and pearson correlation of real numbers.

    Constant predictions or labels, and a single row, have correlation 0 here, where SciPy has nan: a constant answer
    knows nothing, and a nan would compare false with every later epoch and so stay the best one.
    """

    inputs = REALS

    def score(self, *, predictions: Sequence[float], references: Sequence[float]) -> Scores:
        if len(set(predictions)) < 2 or len(set(references)) < 2:
            return {"spearman": 0.0, "pearson": 0.0}
        return {
            "spearman": float(stats.spearmanr(predictions, references).statistic),
            "pearson": float(stats.pearsonr(predictions, references).statistic),
        }


class QuestionF1(TaskMetric):
    """f1_answers, exact_match and their mean, average: MultiRC's measures (Khashabi et al. 2018).

    f1_answers is the F1 of class 1 over the answers of all questions together; exact_match is the share of questions,
    named by `groups`, all of whose answers are classified right.
    """

    inputs = GROUPED

    def score(
        self, *, predictions: Sequence[int], references: Sequence[int], groups: Sequence[str]
    ) -> Scores:
        wrong: dict[str, bool] = defaultdict(bool)
        for group, prediction, reference in zip(groups, predictions, references, strict=True):
            wrong[group] |= prediction != reference
        f1 = float(sk.f1_score(references, predictions, average="binary", zero_division=0))
        exact = 1 - sum(wrong.values()) / len(wrong)
        return {"f1_answers": f1, "exact_match": exact, "average": (f1 + exact) / 2}


class GenderParity(TaskMetric):
    """accuracy and gender_parity, the share of minimal pairs whose two rows get the same prediction (Winogender).

    A pair is a group of two rows; rows alone in their group have no part in it. Where there is no pair at all,
    gender_parity is left out. A constant answer has parity 1: read it beside the accuracy only.
    """

    inputs = GROUPED

    def score(
        self, *, predictions: Sequence[int], references: Sequence[int], groups: Sequence[str]
    ) -> Scores:
        scores = {"accuracy": float(sk.accuracy_score(references, predictions))}
        members = members_of(groups).values()
        pairs = [[predictions[i] for i in rows] for rows in members if len(rows) == 2]
        if pairs:
            scores["gender_parity"] = sum(a == b for a, b in pairs) / len(pairs)
        return scores


class SquadAnswers(TaskMetric):
    """exact_match and f1 of answer texts, as SQuAD's script of version 1.1 has them (Rajpurkar et al. 2016).

    Each prediction is compared with all its gold answers, normalised, and the best one counts: exact_match is 1 where
    the texts are equal, f1 that of the bags of words. Two empty texts match exactly and have f1 0. A row without gold
    answers counts 0.
    """

    inputs = TEXTS

    def score(self, *, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
        pairs = list(zip(predictions, references, strict=True))
        exact = [max((exact_match(p, g) for g in golds), default=0.0) for p, golds in pairs]
        f1 = [max((word_f1(p, g) for g in golds), default=0.0) for p, golds in pairs]
        return {"exact_match": sum(exact) / len(pairs), "f1": sum(f1) / len(pairs)}


class AnswerF1(SquadAnswers):
    """f1, exact_match and their mean, average, of answer texts as `SquadAnswers` has them: ReCoRD's measures.

    Zhang et al. 2018.
    """

    def score(self, *, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
        scores = super().score(predictions=predictions, references=references)
        f1, exact = scores["f1"], scores["exact_match"]
        return {"f1": f1, "exact_match": exact, "average": (f1 + exact) / 2}


class SquadAnswersOrNone(TaskMetric):
    """exact_match and f1 as SQuAD's script of version 2.0 has them (Rajpurkar et al. 2018), whole and in two parts.

    has_answer_* is over the questions with gold answers, no_answer_* over those without; a part without questions is
    left out. No answer is the empty text. Gold answers of which normalising leaves nothing do not count, and without
    any the gold answer is the empty text. f1 of two empty texts is 1, of one it is 0.
    """

    inputs = TEXTS

    def score(self, *, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
        exact, f1 = [], []
        for prediction, golds in zip(predictions, references, strict=True):
            real = [gold for gold in golds if normalise(gold)] or [""]
            exact.append(max(exact_match(prediction, gold) for gold in real))
            f1.append(max(_f1_or_none(prediction, gold) for gold in real))
        scores = {"exact_match": sum(exact) / len(exact), "f1": sum(f1) / len(f1)}
        answered = [bool(golds) for golds in references]
        for part, wanted in (("has_answer", True), ("no_answer", False)):
            rows = [row for row, has in enumerate(answered) if has is wanted]
            if rows:
                scores[f"{part}_exact_match"] = sum(exact[row] for row in rows) / len(rows)
                scores[f"{part}_f1"] = sum(f1[row] for row in rows) / len(rows)
        return scores


class RankedAnswers(TaskMetric):
    """accuracy and f1 (of class 1) of the sign of a score, map and mrr of the order it gives a question's sentences.

    `groups` names the question of each row. map (mean average precision) and mrr (mean reciprocal rank) are over the
    questions that have a right sentence, as Yang et al. 2015 (WikiQA) have them; without any they are left out. Among
    equal scores wrong sentences come first, so that a constant score ranks as badly as can be.
    """

    inputs = RANKED

    def score(
        self, *, predictions: Sequence[float], references: Sequence[int], groups: Sequence[str]
    ) -> Scores:
        decided = [int(value > 0) for value in predictions]
        scores = {
            "accuracy": float(sk.accuracy_score(references, decided)),
            "f1": float(sk.f1_score(references, decided, average="binary", zero_division=0)),
        }
        values, labels = np.asarray(predictions), np.asarray(references)
        ranks = [_ranks(values[rows], labels[rows]) for rows in members_of(groups).values()]
        ranks = [places for places in ranks if len(places)]
        if ranks:
            precisions = [
                np.arange(1, len(places) + 1) / places for places in ranks
            ]  # precision at each right one
            scores["map"] = float(np.mean([np.mean(each) for each in precisions]))
            scores["mrr"] = float(np.mean([1 / places[0] for places in ranks]))
        return scores


def normalise(text: str) -> str:
    """Return `text` in lower case without punctuation, articles and repeated blanks (SQuAD's convention, in its order).

    Only ASCII punctuation goes, and it goes without leaving a blank; articles are whole words then.
    """
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(prediction: str, gold: str) -> float:
    """Return 1 where the normalised texts are equal, else 0."""
    return float(normalise(prediction) == normalise(gold))


def word_f1(prediction: str, gold: str) -> float:
    """Return the F1 of the normalised texts' bags of words; 0 where they share no word, two empty bags included."""
    predicted, expected = normalise(prediction).split(), normalise(gold).split()
    shared = sum((Counter(predicted) & Counter(expected)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(expected)
    return 2 * precision * recall / (precision + recall)  # in the scripts' order, so equal to the last digit


def members_of(groups: Iterable[Hashable]) -> dict[Any, list[int]]:
    """Return group -> its row numbers, groups in the order in which they first occur."""
    members: dict[Any, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    return dict(members)


def _ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the places, from 1 and rising, of the right sentences in the order of falling scores."""
    order = np.lexsort((labels, -scores))
    return np.flatnonzero(labels[order] == 1) + 1


def _f1_or_none(prediction: str, gold: str) -> float:
    if normalise(prediction) and normalise(gold):
        return word_f1(prediction, gold)
    return float(normalise(prediction) == normalise(gold))
