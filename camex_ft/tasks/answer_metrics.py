"""Metrics of question answering: SQuAD's two official scripts, and the ranking measures of WikiQA."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Value
from sklearn import metrics as sk

from camex_ft.tasks.metrics import (
    TEXTS,
    Inputs,
    Scores,
    TaskMetric,
    exact_match,
    members_of,
    normalise,
    word_f1,
)

RANKED: Inputs = {"predictions": Value("float64"), "references": Value("int64"), "groups": Value("string")}


class SquadAnswers(TaskMetric):
    """exact_match and f1 of answer texts, as SQuAD's script of version 1.1 has them (Rajpurkar et al. 2016).

    Each prediction is compared with all its gold answers, normalised, and the best one counts. Two empty texts match
    exactly and have f1 0. A question without gold answers counts 0.
    """

    inputs = TEXTS

    def score(self, *, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
        pairs = list(zip(predictions, references, strict=True))
        exact = [max((exact_match(p, g) for g in golds), default=0.0) for p, golds in pairs]
        f1 = [max((word_f1(p, g) for g in golds), default=0.0) for p, golds in pairs]
        return {"exact_match": sum(exact) / len(pairs), "f1": sum(f1) / len(pairs)}


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
            found = [
                np.arange(1, len(places) + 1) / places for places in ranks
            ]  # precision at each right one
            scores["map"] = float(np.mean([np.mean(each) for each in found]))
            scores["mrr"] = float(np.mean([1 / places[0] for places in ranks]))
        return scores


def _ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the places, from 1 and rising, of the right sentences in the order of falling scores."""
    order = np.lexsort((labels, -scores))
    return np.flatnonzero(labels[order] == 1) + 1


def _f1_or_none(prediction: str, gold: str) -> float:
    if normalise(prediction) and normalise(gold):
        return word_f1(prediction, gold)
    return float(normalise(prediction) == normalise(gold))
