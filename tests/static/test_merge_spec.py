"""Specifications of merges: read with overrides, and every mistake reported with its line and the nearest name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from camex_ft.config.problems import ConfigErrors
from camex_ft.config.shipped import list_configs, list_merges
from camex_ft.static.merge_spec import MergeSpec, make_spec, read_merge_spec

GOOD = """\
start: embedded/llama
from: [./law, org/code]
method: ties
options: {density: 0.2}
weights: [1.0, 0.5]
output: merged
"""


def read(tmp_path: Path, text: str, *overrides: str) -> MergeSpec:
    file = tmp_path / "merge.yaml"
    file.write_text(text, encoding="utf-8")
    return read_merge_spec(file, overrides)


def test_a_specification_is_read_with_overrides(tmp_path: Path) -> None:
    spec = read(tmp_path, GOOD, "options.density=0.5", "weights=[2, 1]", "seed=3")
    assert spec.donors == ["./law", "org/code"]
    assert spec.options == {"density": 0.5}
    assert spec.weights_of("anything") == [2.0, 1.0]
    assert spec.seed == 3


def test_weights_default_to_one_and_the_first_pattern_wins() -> None:
    assert make_spec({"start": "s", "from": ["a", "b"]}).weights_of("x") == [1.0, 1.0]
    spec = make_spec({"start": "s", "from": ["a"], "weights": {"*.mlp.*": [2.0], "model.*": [3.0]}})
    assert [spec.weights_of(n) for n in ("model.0.mlp.up", "model.norm", "lm_head")] == [[2.0], [3.0], [1.0]]
    assert spec.unmatched(["model.norm"]) == ["*.mlp.*"]


@pytest.mark.parametrize(
    ("before", "after", "line", "message"),
    [
        ("method: ties", "methode: ties", 3, "Did you mean 'method'?"),
        ("method: ties", "method: tie", 3, "Did you mean 'ties'?"),
        ("method: ties", "method: slerp", 4, "unknown option of 'slerp'"),
        ("density: 0.2", "densitiy: 0.2", 4, "Did you mean 'density'?"),
        ("density: 0.2", "density: 1.2", 4, "expected at most 1"),
        ("density: 0.2", "density: all", 4, "expected a number"),
        ("[1.0, 0.5]", "[1.0]", 5, "expected a number for each of the 2 donors, got 1"),
        ("[1.0, 0.5]", "[1.0, x]", 5, "expected a number for each donor"),
        ("[1.0, 0.5]", "[1.0, .inf]", 5, "expected a number for each donor"),
        ("[1.0, 0.5]", "{'*.mlp.*': [1]}", 5, "expected a number for each of the 2 donors, got 1"),
        ("from: [./law, org/code]", "from: ./law", 2, "expected a list of donors"),
        ("output: merged", "data: {rows: 3}", 6, "takes no rows of text"),
        ("output: merged", "data: {rowz: 3}", 6, "Did you mean 'rows'?"),
        ("output: merged", "search: {budget: 3}", 6, "search.config: is missing"),
        ("output: merged", "search: {config: lm, over: {densty: [0.1, 1]}}", 6, "Did you mean 'density'?"),
        ("output: merged", "search: {config: lm, over: {density: [0.0, 1]}}", 6, "expected more than 0"),
        (
            "output: merged",
            "search: {config: lm, over: {scale: [2, 1]}}",
            6,
            "the least value before the greatest",
        ),
        ("output: merged", "dtype: int8", 6, "dtype"),
    ],
)
def test_a_mistake_has_its_line(tmp_path: Path, before: str, after: str, line: int, message: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        read(tmp_path, GOOD.replace(before, after))
    problem = next(p for p in caught.value.problems if message in str(p))
    assert problem.origin is not None
    assert problem.origin.line == line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "slerp", "from": ["a", "b", "c"]}, "merges 2 donors: got 3"),
        ({"method": "slerp", "weights": [1.0, 1.0]}, "has no weights"),
        ({"method": "average", "weights": [1.0, -1.0]}, "a positive sum"),
        ({"method": "fisher", "weights": [2.0, -1.0], "data": {}}, "expected 0 or more"),
        ({"method": "regmean"}, "needs rows of text"),
        ({"method": "regmean", "data": {"config": ["lm"]}}, "one for each of the 2 donors, got 1"),
        ({"method": "regmean", "data": {"set": {"a": 1}}}, "changes need data.config"),
    ],
)
def test_what_does_not_fit_the_method_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigErrors, match=message):
        make_spec({"start": "s", "from": ["a", "b"], **changes})


def test_all_mistakes_are_reported_together(tmp_path: Path) -> None:
    text = GOOD.replace("density: 0.2", "density: 2, x: 1").replace("[1.0, 0.5]", "[1.0]")
    with pytest.raises(ConfigErrors) as caught:
        read(tmp_path, text)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("shipped", list_merges(), ids=lambda each: each.name)
def test_shipped_specifications_are_valid_and_no_configurations(shipped: Any) -> None:
    assert read_merge_spec(shipped.name).donors
    assert shipped.summary
    assert shipped.name not in [each.name for each in list_configs()]
