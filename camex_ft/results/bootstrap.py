"""Bootstrap over a handful of seeds, and what counts as no spread and no difference there."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import combinations_with_replacement

import numpy as np
from scipy import special

EXACT = 8  # up to so many pairs all C(2n - 1, n) samples are counted: 6,435 for 8
DRAWS = 20_000  # of the Monte Carlo bootstrap for more pairs
ALIKE = 1e-10  # a spread below this part of the scores is their rounding


def paired_bootstrap(scores: np.ndarray, baseline: np.ndarray, *, seed: int = 0) -> float | None:
    """Return p of the studentised bootstrap of the mean difference, two-sided.

    The differences are centred, so that the hypothesis of no difference holds, and drawn with replacement; p is the
    probability that a sample's |t| is at least the observed one. A sample of one value n times over has |t| = infinity.
    All samples are enumerated for up to 8 pairs; beyond, 20,000 are drawn and p = (1 + hits) / (1 + draws). None and 1
    as in `paired_t`. Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, algorithm 16.2.

    Args:
        scores, baseline: [n], in the order of the seeds.
        seed: of the draws.
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
    # a sample with exactly the observed t counts, whatever the order of summation does to it
    return (drawn >= observed[:, None] * (1 - 1e-9)) @ weights


@lru_cache(maxsize=EXACT)
def multisets(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all samples of n out of n with replacement, regardless of order: counts [C(2n-1, n), n], probabilities."""
    drawn = combinations_with_replacement(range(n), n)
    counts = np.array([np.bincount(sample, minlength=n) for sample in drawn])
    log = special.gammaln(n + 1) - special.gammaln(counts + 1).sum(axis=1) - n * math.log(n)
    return counts, np.exp(log)


def without_spread(scores: np.ndarray, baseline: np.ndarray) -> bool:
    """Return whether the differences are all the same, but for rounding, or fewer than two."""
    return len(scores) < 2 or bool(np.std(scores - baseline) <= ALIKE * _size(scores, baseline))


def without_difference(scores: np.ndarray, baseline: np.ndarray) -> bool:
    """Return whether there are two pairs or more, and all differences are 0 but for rounding."""
    return len(scores) > 1 and bool(np.abs(scores - baseline).max() <= ALIKE * _size(scores, baseline))


def _size(scores: np.ndarray, baseline: np.ndarray) -> float:
    return float(max(np.abs(scores).max(initial=0), np.abs(baseline).max(initial=0)))
