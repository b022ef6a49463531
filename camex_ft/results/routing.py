"""Statistics of routing weights, as NumPy arrays: entropy, load, and agreement with known domains."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from camex_ft.results.record import RoutingStatistics

ROUNDING = 1e-3  # of a sum of weights in the lowest precision that routing has


def entropy(weights: ArrayLike) -> float:
    """Return the mean over inputs of -sum_i s_i ln s_i, in nats: 0 for one-hot routing, ln N for uniform.

    Args:
        weights: routing weights s; [n, N], each row >= 0 and summing to 1; a row that sums to less, as with a softmax
            before the choice of experts, is scaled to 1. NaN for n = 0.
    """
    s = _weights(weights)
    total = s.sum(axis=1, keepdims=True)
    s = s / np.where((total > 0) & (total < 1 - ROUNDING), total, 1.0)
    terms = np.where(s > 0, s * np.log(np.where(s > 0, s, 1.0)), 0.0)
    return float(-terms.sum(axis=1).mean()) if len(s) else float("nan")


def load(weights: ArrayLike) -> np.ndarray:
    """Return the share of inputs whose largest routing weight is each expert's; [N], float64, sums to 1 (0 for n = 0).

    A tie counts for the expert of lowest index.
    """
    s = _weights(weights)
    return np.bincount(s.argmax(axis=1), minlength=s.shape[1]) / max(len(s), 1)


def nmi(assignments: ArrayLike, domains: ArrayLike) -> float:
    """Return the normalised mutual information I(a; d) / mean(H(a), H(d)) of two labellings; 0 independent, 1 the same.

    Args:
        assignments: the expert of each input; [n], integers.
        domains: its true domain; [n], integers.
    """
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(np.asarray(domains), np.asarray(assignments)))


def means_by(weights: ArrayLike, kinds: ArrayLike) -> dict[str, list[float | None]]:
    """Return the mean routing weights [N] of the inputs of each kind, to 4 decimals; kinds by name.

    Args:
        weights: routing weights s; [n, N].
        kinds: of each input; [n], such as labels or domains.
    """
    s, kinds = _weights(weights), np.asarray(kinds)
    return {str(kind): s[kinds == kind].mean(axis=0).round(4).tolist() for kind in np.unique(kinds)}


def layer_routing(weights: ArrayLike, kinds: Mapping[str, ArrayLike] | None = None) -> RoutingStatistics:
    """Return one layer's entry of the record from routing weights [n, N].

    Args:
        weights: routing weights s; [n, N]. An input is assigned to the expert of its largest one.
        kinds: of what kind each input is, [n], by the name of the distinction; "domain" is scored against (`nmi`).
    """
    s, kinds = _weights(weights), kinds or {}
    score = nmi(s.argmax(axis=1), kinds["domain"]) if "domain" in kinds else None
    by = {name: means_by(s, each) for name, each in kinds.items()}
    return RoutingStatistics(entropy=entropy(s), load=load(s).tolist(), nmi=score, by=by)


def _weights(weights: ArrayLike) -> np.ndarray:
    s = np.asarray(weights, dtype=np.float64)
    if s.ndim != 2:
        raise ValueError(f"routing weights are [inputs, experts], not of shape {s.shape}")
    return s
