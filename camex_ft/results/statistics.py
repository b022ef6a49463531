"""Paired tests of one row against another over seeds. docs/statistics.md explains the choice of tests.

All of them are about the differences d_i = score_i - baseline_i of the seeds that both rows have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement
from statistics import median

import numpy as np
from scipy import optimize, special, stats

# -- tests of two rows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Standardised mean difference: Hedges' g, and the interval of the d that it estimates."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """McNemar's test over seeds: rows that only this row's models have right, only the baseline's; p."""

    seeds: int
    gained: int
    lost: int
    p: float


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Paired comparison of two rows, over the seeds that both have. Values that cannot be computed are None.

    The mean difference has a t-interval from `low` to `high`; p is two-sided, of `paired_t` and `paired_bootstrap`.
    """

    seeds: tuple[int, ...]
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    effect: Effect = Effect()
    p_t: float | None = None
    p_bootstrap: float | None = None
    mcnemar: McNemar | None = None


def compare(
    scores: Mapping[int, float | None],
    baseline: Mapping[int, float | None],
    *,
    correct: Mapping[int, np.ndarray] | None = None,
    baseline_correct: Mapping[int, np.ndarray] | None = None,
    level: float = 0.05,
) -> PairedComparison:
    """Compare two rows, seed -> score; seeds without a finite score in both are left out.

    Args:
        correct, baseline_correct: seed -> bool [rows], True for each validation row that the model gets right.
        level: 1 - confidence level of the intervals.
    """
    seeds, ours, theirs = pairs(scores, baseline)
    if not seeds:
        return PairedComparison(seeds=())
    p_t, low, high = paired_t(ours, theirs, level=level)
    return PairedComparison(
        seeds=seeds,
        difference=float(np.mean(ours - theirs)),
        low=low,
        high=high,
        effect=effect_size(ours, theirs, level=level),
        p_t=p_t,
        p_bootstrap=paired_bootstrap(ours, theirs),
        mcnemar=mcnemar(correct or {}, baseline_correct or {}, seeds),
    )


def pairs(
    scores: Mapping[int, float | None], baseline: Mapping[int, float | None]
) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """Return the seeds for which both rows have a finite score, and the scores of each; [n]."""
    shared = scores.keys() & baseline.keys()
    seeds = tuple(sorted(s for s in shared if finite(scores[s]) and finite(baseline[s])))
    return seeds, np.array([scores[s] for s in seeds], float), np.array([baseline[s] for s in seeds], float)


def finite(value: float | None) -> bool:
    """Return whether the value is a finite number."""
    return value is not None and math.isfinite(value)


def paired_t(
    scores: np.ndarray, baseline: np.ndarray, *, level: float = 0.05
) -> tuple[float | None, float | None, float | None]:
    """Return p of the paired t-test (two-sided) and the interval of the mean difference; from SciPy.

    All are None for fewer than two pairs, and for equal differences, which have no spread; p is 1 if all are 0. Scores
    are [n], in the order of the seeds; the confidence level is 1 - `level`.
    """
    if len(scores) < 2 or without_spread(scores, baseline):
        return (1.0 if without_difference(scores, baseline) else None), None, None
    test = stats.ttest_rel(scores, baseline)
    interval = test.confidence_interval(1 - level)
    return float(test.pvalue), float(interval.low), float(interval.high)


def effect_size(scores: np.ndarray, baseline: np.ndarray, *, level: float = 0.05) -> Effect:
    """Return Hedges' g = J(n - 1) mean(d) / sd(d), and the exact interval of the population's mean / sd.

    J(f) = Gamma(f / 2) / (sqrt(f / 2) Gamma((f - 1) / 2)) removes the bias. The interval holds the delta for which
    the observed t is no rarer than level / 2 under the noncentral t with delta sqrt(n). Nothing for fewer than three
    pairs (J(1) = 0) or differences without spread. Source: Hedges, 1981.
    """
    n = len(scores)
    if n < 3 or without_spread(scores, baseline):
        return Effect()
    differences = scores - baseline
    d = float(differences.mean() / differences.std(ddof=1))
    t, freedom = d * math.sqrt(n), n - 1
    correction = math.exp(special.gammaln(freedom / 2) - special.gammaln((freedom - 1) / 2))
    correction /= math.sqrt(freedom / 2)
    reach = 5 + 3 * abs(t)

    def bound(tail: float) -> float | None:
        # for positive t, as SciPy's noncentral t is inexact for negative t
        try:
            limit = optimize.brentq(lambda nc: stats.nct.cdf(abs(t), freedom, nc) - tail, -reach, reach)
        except ValueError:  # nearly equal differences: t is too large for the search
            return None
        return float(limit) / math.sqrt(n)

    low, high = bound(1 - level / 2), bound(level / 2)
    if low is None or high is None:
        return Effect(value=correction * d)
    return Effect(value=correction * d, low=low if t > 0 else -high, high=high if t > 0 else -low)


def mcnemar(
    correct: Mapping[int, np.ndarray], baseline: Mapping[int, np.ndarray], seeds: Sequence[int]
) -> McNemar | None:
    """Return McNemar's exact test of the answers of each seed's two models, combined over seeds; None without answers.

    Per seed: a binomial test with 1/2 (`scipy.stats.binomtest`) of the rows that only one of the models has right.
    Over several seeds: p = min(1, 2 median p), valid for any dependence of the seeds, which share the rows. Source:
    Rueger, 1978. Answers are seed -> bool [rows]; seeds that one lacks are left out.

    Raises:
        ValueError: the two models of a seed answered different numbers of rows.
    """
    gained, lost, p = [], [], []
    for seed in (seed for seed in seeds if seed in correct and seed in baseline):
        ours, theirs = correct[seed], baseline[seed]
        if ours.shape != theirs.shape:
            raise ValueError(f"seed {seed}: answers to {len(ours)} and to {len(theirs)} rows")
        gained.append(int((ours & ~theirs).sum()))
        lost.append(int((theirs & ~ours).sum()))
        both = gained[-1] + lost[-1]
        p.append(float(stats.binomtest(gained[-1], both, 0.5).pvalue) if both else 1.0)
    if not p:
        return None
    combined = p[0] if len(p) == 1 else min(1.0, 2 * median(p))
    return McNemar(seeds=len(p), gained=sum(gained), lost=sum(lost), p=combined)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Return p-values corrected by Holm's step-down method, in the order given.

    The k-th smallest of m becomes the largest of (m - j + 1) p_(j) over j <= k, at most 1. None, an untested
    comparison, stays None and counts as p = 1. Source: Holm, 1979.
    """
    values = np.array([1.0 if value is None else value for value in p])
    order = np.argsort(values, kind="stable")
    steps = np.minimum(1.0, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    corrected = np.empty_like(values)
    corrected[order] = steps
    return [None if before is None else float(after) for before, after in zip(p, corrected, strict=True)]


# -- bootstrap --------------------------------------------------------------------------------------------------------


EXACT = 8  # largest number of pairs for which all C(2n - 1, n) samples are enumerated: 6,435 for 8
DRAWS = 20_000  # samples for more pairs
ALIKE = 1e-10  # a spread below this share of the scores is rounding


def paired_bootstrap(scores: np.ndarray, baseline: np.ndarray, *, seed: int = 0) -> float | None:
    """Return p of the studentised bootstrap of the mean difference, two-sided.

    The differences are centred, as under the hypothesis of no difference, and drawn with replacement; p is the
    probability that a sample's |t| is at least the observed one. A sample of one value n times over has |t| = infinity.
    All samples are enumerated for up to 8 pairs; beyond, 20,000 are drawn and p = (1 + hits) / (1 + draws). None and 1
    as in `paired_t`. Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, algorithm 16.2.
    """
    n = len(scores)
    if n < 2 or without_spread(scores, baseline):
        return 1.0 if without_difference(scores, baseline) else None
    differences = (scores - baseline)[None]
    if n <= EXACT:
        return float(bootstrap_p(differences, *multisets(n))[0])
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS)
    hits = bootstrap_p(differences, counts, np.ones(DRAWS))[0]
    return float((1 + hits) / (1 + DRAWS))


def bootstrap_p(differences: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weight of the samples whose |t| is at least the observed one; [sets].

    Args:
        differences: [sets, n].
        counts: [samples, n], how often a sample holds each difference.
        weights: [samples].
    """
    n = differences.shape[1]
    mean = differences.mean(axis=1)
    centred = differences - mean[:, None]
    observed = np.abs(mean) / np.sqrt((centred**2).sum(axis=1) / (n * (n - 1)))
    drawn_mean, square = centred @ counts.T / n, centred**2 @ counts.T / n
    spread = np.maximum(square - drawn_mean**2, 0)
    flat = (spread <= ALIKE * square) | (counts.max(axis=1) == n)
    drawn = np.where(flat, np.inf, np.abs(drawn_mean) / np.sqrt(np.where(flat, 1, spread) / (n - 1)))
    # a sample with exactly the observed t counts, despite rounding
    return (drawn >= observed[:, None] * (1 - 1e-9)) @ weights


@lru_cache(maxsize=EXACT)
def multisets(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all samples of n out of n with replacement, regardless of order: counts [C(2n-1, n), n], probabilities."""
    drawn = combinations_with_replacement(range(n), n)
    counts = np.array([np.bincount(sample, minlength=n) for sample in drawn])
    log = special.gammaln(n + 1) - special.gammaln(counts + 1).sum(axis=1) - n * math.log(n)
    return counts, np.exp(log)


def without_spread(scores: np.ndarray, baseline: np.ndarray) -> bool:
    """Return whether there are fewer than two differences, or all are equal except for rounding."""
    return len(scores) < 2 or bool(np.std(scores - baseline) <= ALIKE * np.abs([scores, baseline]).max())


def without_difference(scores: np.ndarray, baseline: np.ndarray) -> bool:
    """Return whether there are two pairs or more, and all differences are 0 except for rounding."""
    difference = np.abs(scores - baseline)
    return len(scores) > 1 and bool(difference.max() <= ALIKE * np.abs([scores, baseline]).max())
