"""The cost model: what it counts, and how it stands to the measurement that it was fitted to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camex_ft.moe.merging import functional as cost
from camex_ft.moe.merging.functional import Shape

RECORD = Path(__file__).resolve().parents[3] / "results" / "bench" / "cost-768x3072-float32-cpu.json"
LAYER = Shape(groups=16, length=128, out=3072, width=768, experts=8, used=8)
SHAPES = st.builds(
    Shape,
    groups=st.integers(1, 64),
    length=st.integers(1, 512),
    out=st.integers(1, 4096),
    width=st.integers(1, 4096),
    experts=st.integers(2, 16),
    used=st.floats(1, 2),
)


def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def shape_of(point: dict[str, Any]) -> Shape:
    return Shape(
        groups=point["batch"],
        length=point["length"],
        out=3072,
        width=768,
        experts=point["experts"],
        used=point["top_k"],
        rank=point["rank"],
        factors=168 if point["rank"] else 0,
    )


def test_counts_are_those_of_the_method() -> None:
    area = 3072 * 768
    counted = cost.counts("merge", LAYER)
    expected = {"token": 16 * 128 * area, "slice": 16 * area, "sum": 16 * 8 * area, "vector": 8 * area}
    assert counted == expected
    assert cost.counts("mix", LAYER)["token"] == 9 * 16 * 128 * area
    assert cost.counts("curve", LAYER) == {"factor": 0, "vector": 0}
    curved = replace(LAYER, rank=2, factors=168)
    assert cost.counts("curve", curved)["factor"] == 2 * 8 * area * 168


def test_the_rates_are_the_measured_ones() -> None:
    assert {part: dict(rates) for part, rates in cost.RATES.items()} == record()["rates"]


def test_the_model_predicts_every_point() -> None:
    for point in record()["points"]:
        assert cost.predict(point["form"], shape_of(point)) == pytest.approx(point["predicted"], rel=1e-3)
        assert point["predicted"] == pytest.approx(point["seconds"], rel=0.25), point


def test_the_chosen_form_is_never_much_slower() -> None:
    forms: dict[Shape, dict[str, float]] = {}
    for point in record()["points"]:
        forms.setdefault(shape_of(point), {})[point["form"]] = point["seconds"]
    both = {shape: seconds for shape, seconds in forms.items() if len(seconds) == 2}
    assert {shape.length for shape in both} == {4, 8, 16, 32, 64}
    for shape, seconds in both.items():
        assert seconds[cost.cheaper(shape)] <= 1.15 * min(seconds.values()), shape


@given(SHAPES)
def test_few_tokens_are_mixed_and_many_merged(shape: Shape) -> None:
    forms = [cost.cheaper(replace(shape, length=length)) for length in (1, 2, 4, 8, 16, 32, 64, 128, 512)]
    assert forms == sorted(forms, reverse=True)  # "mix" up to some length, "merge" from there


def test_curvature_is_made_once_where_it_outweighs_the_tokens() -> None:
    assert cost.transforms_once(replace(LAYER, rank=8, factors=168))
    assert not cost.transforms_once(replace(LAYER, rank=1, factors=168))
    assert not cost.transforms_once(LAYER)
