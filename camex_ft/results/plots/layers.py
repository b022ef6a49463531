"""Numbers to draw of single runs, layer by layer: routing, load, distance of the curvature from the identity."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from camex_ft.results.entries import Result
from camex_ft.utils.escaping import one_line

LAYERS = 4  # of a model in one picture


def loads(result: Result) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return epochs [n] and, by layer, each expert's share of the groups at every logging step; [n, N]."""
    lines = [line for line in result.history if line.get("routing_load") and line.get("epoch") is not None]
    names = list(lines[0]["routing_load"]) if lines else []
    whole = [line for line in lines if all(name in line["routing_load"] for name in names)]
    return (
        np.array([line["epoch"] for line in whole], dtype=float),
        {
            name: np.array([line["routing_load"][name] for line in whole], dtype=float).reshape(
                len(whole), -1
            )
            for name in names
        },
    )


def short_layers(names: Sequence[str]) -> dict[str, str]:
    """Return short names of layers, such as "decoder 3"; the full ones where short ones would not differ."""
    made = {}
    for name in names:
        stack = re.search(r"\b(encoder|decoder)\b", name)
        number = re.search(r"\.(\d+)\b", name)
        made[name] = f"{stack[0] if stack else 'layer'} {number[1]}" if number else name
    return made if len(set(made.values())) == len(made) else {name: name for name in names}


def some_of(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` items, the first and the last among them, evenly spread."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def routing_by(
    results: Mapping[str, Result], kind: str
) -> tuple[list[str], dict[str, dict[str, np.ndarray]]]:
    """Return the names of one kind's groups, and by row and layer the mean routing weights; [groups, N], NaN where
    unknown."""
    layers = {
        row: {k: v.by[kind] for k, v in r.record.routing.items() if kind in v.by}
        for row, r in results.items()
    }
    groups = list(dict.fromkeys(g for some in layers.values() for by in some.values() for g in by))
    if all(group.lstrip("-").isdigit() for group in groups):
        groups.sort(key=int)
    made = {}
    for row, some in layers.items():
        names = short_layers(list(some))
        made[row] = {
            names[layer]: _matrix([some[layer].get(group) for group in groups])
            for layer in some_of(list(some), LAYERS)
        }
    return [one_line(group) for group in groups], made


def _matrix(rows: Sequence[Sequence[float | None] | None]) -> np.ndarray:
    width = max(len(row) for row in rows if row is not None)
    return np.array(
        [[np.nan if v is None else v for v in row or [None] * width] for row in rows], dtype=float
    )


def load_of(result: Result) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return epochs and shares of at most `LAYERS` layers, under short names."""
    epochs, by_layer = loads(result)
    names = short_layers(list(by_layer))
    return epochs, {names[layer]: by_layer[layer] for layer in some_of(list(by_layer), LAYERS)}


def distance_of(result: Result) -> tuple[list[str], np.ndarray]:
    """Return short names of the layers, and distances of their curvature from the identity; [layers, N]."""
    curvature = result.record.curvature
    names = short_layers(list(curvature))
    return list(names.values()), _matrix([layer.distance for layer in curvature.values()])
