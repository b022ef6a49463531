"""The pictures that need more than records: those of an inspection's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from camex_ft.results.plots import layers, lines, maps
from camex_ft.results.plots.scenes import Choice
from camex_ft.utils.escaping import one_line

SIMILAR = 12  # layers in the picture of similarities


def of_inspection(numbers: Mapping[str, Any], made: Choice | None = None) -> Choice:
    """Return the pictures ``similarity`` and ``spectrum`` of one run.

    Args:
        numbers: what ``inspection.json`` holds.
        made: pictures to add them to.
    """
    made = made or Choice()
    title = one_line(f"{numbers['task']}: {numbers['protocol']}, seed {numbers['seed']}")
    _similarity(made, numbers["domain_vectors"], title)
    _spectrum(made, numbers["spectrum"], title)
    return made


def _similarity(made: Choice, vectors: Mapping[str, Any], title: str) -> None:
    if not vectors:
        made.left_out["similarity"] = "the model has no experts"
        return
    names = layers.short_layers(list(vectors))
    shown = {names[n]: _array(vectors[n]["cosine"]) for n in layers.some_of(list(vectors), SIMILAR)}
    if not any(np.isfinite(matrix).any() for matrix in shown.values()):
        made.left_out["similarity"] = "every expert equals its base expert, so that there is no domain vector"
        return
    made.add(
        "similarity",
        maps.similarity(shown, title=f"{title}, similarity of domain vectors"),
        "Cosine similarity of the experts' domain vectors, all matrices and biases of a layer taken together: 1 where "
        "two experts have moved the same way from the base expert (where there is none, from the experts' mean).",
    )


def _spectrum(made: Choice, learned: Mapping[str, Any], title: str) -> None:
    if not learned:
        made.left_out["spectrum"] = "the model has no curvature"
        return
    names = layers.short_layers(list(learned))
    matrices = list(dict.fromkeys(which for some in learned.values() for which in some))
    shown = {
        f"{names[name]}, {which}": _array(some[which]["values"])
        for which in matrices
        for name, some in learned.items()
        if which in some
    }
    exact = all(found["exact"] for some in learned.values() for found in some.values())
    how = (
        "computed from its factors"
        if exact
        else "estimated by Golub-Kahan bidiagonalisation from random starts"
    )
    made.add(
        "spectrum",
        lines.spectrum(shown, title=f"{title}, spectrum of the curvature", columns=len(learned)),
        f"Singular values of each expert's curvature, from the largest to the smallest, {how}. The identity has 1 "
        "throughout; a number names its expert.",
    )


def _array(rows: Any) -> np.ndarray:
    return np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=float)
