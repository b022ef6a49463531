"""Warnings about routing: where experts act as one, and where one expert does all."""

from __future__ import annotations

import math

import pytest

from camex_ft.utils.routing_health import routing_warnings

EVEN, ALL = [0.25] * 4, [0.99, 0.01, 0.0, 0.0]


@pytest.mark.parametrize(
    ("entropies", "loads", "expected"),
    [
        ({"a": math.log(4)}, {"a": EVEN}, ["routing is flat in a:"]),
        ({"a": math.log(4), "b": math.log(4)}, {"a": EVEN, "b": ALL}, ["routing is flat in all 2 layers:"]),
        ({"a": 0.1, "b": 0.1, "c": 1.0}, {"a": ALL, "b": ALL, "c": EVEN}, ["input in a and 1 more: raise"]),
        ({"a": math.log(4), "b": 0.0}, {"a": EVEN, "b": ALL}, ["flat in a:", "almost every input in b:"]),
        ({"a": 1.3}, {"a": ALL}, []),  # weights that hardly differ: the others serve every input as well
        ({"a": 1.0}, {"a": [0.9, 0.1, 0.0, 0.0]}, []),
        ({"a": None}, {"a": EVEN}, []),  # of a record that holds no number
        ({}, {}, []),
    ],
)
def test_warnings(entropies: dict[str, float], loads: dict[str, list[float]], expected: list[str]) -> None:
    said = routing_warnings(entropies, loads)
    assert len(said) == len(expected)
    assert all(part in warning for part, warning in zip(expected, said, strict=True))
