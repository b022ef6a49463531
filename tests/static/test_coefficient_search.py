"""Searches of options and weights: the budget is kept, the best candidate is taken, and a seed repeats it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from camex_ft.static.coefficient_search import SearchPoint, Space, best_of, explore
from camex_ft.static.merge import write_merge
from camex_ft.static.merge_spec import MergeSpec, make_spec
from tests.helpers.merge_reference import llamas, save


def spec_of(**search: Any) -> MergeSpec:
    values = {"start": "s", "from": ["a", "b"], "method": "ties", "search": {"config": "lm", **search}}
    return make_spec(values)


def bowl(spec: MergeSpec) -> float:
    """A loss that is 0 at scale 1.1 and density 0.6."""
    return float((spec.options["scale"] - 1.1) ** 2 + (spec.options["density"] - 0.6) ** 2)


@pytest.mark.parametrize("budget", [2, 3, 7, 30])
def test_the_budget_is_not_exceeded_and_what_is_written_comes_first(budget: int) -> None:
    candidates = explore(spec_of(budget=budget), bowl, metric="loss", greater_is_better=False)
    assert len(candidates) == budget
    assert candidates[0].values == {"scale": 1.0, "density": 0.2}


def test_a_minimum_is_approached_and_a_seed_repeats_it() -> None:
    spec = spec_of(budget=40)
    candidates = explore(spec, bowl, metric="loss", greater_is_better=False)
    best = best_of(candidates, greater_is_better=False)
    assert best.value is not None
    assert best.value < 0.002
    assert candidates == explore(spec, bowl, metric="loss", greater_is_better=False)
    other = explore(spec_of(budget=40, seed=1), bowl, metric="loss", greater_is_better=False)
    assert candidates != other


def test_a_metric_that_grows_is_maximised() -> None:
    candidates = explore(spec_of(budget=30), lambda s: 1 - bowl(s), metric="accuracy", greater_is_better=True)
    assert (best_of(candidates, greater_is_better=True).value or 0) > 0.99


def test_values_stay_within_their_ranges_and_weights_have_a_dimension_a_donor() -> None:
    spec = spec_of(budget=30, over={"density": [0.4, 0.5], "weights": [-1.0, 1.0]})
    assert len(Space.of(spec).ranges) == 3
    candidates = explore(spec, lambda s: sum(s.weights_of("")), metric="loss", greater_is_better=False)
    for candidate in candidates[1:]:
        assert 0.4 <= candidate.values["density"] <= 0.5
        assert all(-1 <= weight <= 1 for weight in candidate.values["weights"])


def test_points_that_are_not_valid_are_not_measured() -> None:
    values = {"start": "s", "from": ["a", "b"], "method": "average"}
    spec = make_spec({**values, "search": {"config": "lm", "budget": 20, "over": {"weights": [-1.0, 1.0]}}})
    candidates = explore(spec, lambda s: 1.0, metric="loss", greater_is_better=False)
    assert {c.value is None for c in candidates if sum(c.values["weights"]) <= 0} <= {True}
    assert any(c.value is None for c in candidates)


def test_a_value_that_is_not_finite_is_never_the_best() -> None:
    candidates = [
        SearchPoint(values={"scale": n}, metric="loss", value=v) for n, v in enumerate([3.0, None, 2.0, 2.0])
    ]
    assert best_of(candidates, greater_is_better=False).values == {"scale": 2}
    assert best_of(candidates, greater_is_better=True).values == {"scale": 0}


def test_a_search_on_a_validation_split_takes_the_best_candidate(tmp_path: Path) -> None:
    start, tokenizer, donors = llamas(2)
    places = [save(m, tokenizer, tmp_path / str(n)) for n, m in enumerate([start, *donors])]
    changes = {
        "profile": "embedded",
        "backbone": "embedded/llama",
        "data.train_rows": 20,
        "data.eval_rows": 20,
    }
    search = {"config": "lm", "set": changes, "budget": 4}
    spec = make_spec({"start": places[0], "from": places[1:], "method": "arithmetic", "search": search})
    lines: list[str] = []
    record = write_merge(spec, tmp_path / "out", say=lines.append).record
    candidates = record["search"]["candidates"]
    assert len(candidates) == len(lines) == 4
    best = min(candidates, key=lambda c: c["perplexity"])
    assert record["options"]["scale"] == best["values"]["scale"]
