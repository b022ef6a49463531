"""``camex-ft bench cost``: the fit finds rates again, and what the record says of its points is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from camex_ft.bench.layer import Point, bench_cost, fit, grid, judge, row, table
from camex_ft.bench.settings import CostBench, LayerBench
from camex_ft.cli import app
from camex_ft.moe.merging import functional as cost
from camex_ft.moe.merging.functional import Part

TRUE: dict[Part, dict[str, float]] = {
    "merge": {"token": 0.05, "slice": 1.5, "sum": 0.1, "vector": 3.0},
    "mix": {"token": 0.06, "vector": 2.5},
    "curve": {"factor": 0.07, "vector": 4.0},
}


def points() -> list[Point]:
    """Every point of the grid with the time that the true rates give."""
    made = []
    for forms, settings in grid(CostBench()):
        for form in forms:
            empty = Point(form, settings, ())
            made.append(replace(empty, times=(cost.predict(form, empty.shape(), TRUE),)))
    return made


def test_the_fit_finds_the_rates_again() -> None:
    found = fit(points())
    for part, rates in TRUE.items():
        assert found[part] == pytest.approx(rates, rel=1e-6), part


def test_the_grid_has_what_the_model_is_for() -> None:
    shapes = [settings for _, settings in grid(CostBench())]
    assert {s.experts for s in shapes} >= {2, 4, 8, 16}
    assert {s.length for s in shapes} >= {4, 8, 16, 32, 64, 128, 256, 512}
    assert {s.effective_rank for s in shapes} == {0, 1, 2, 8}
    assert {len(forms) for forms, _ in grid(CostBench())} == {1, 2}


def test_errors_and_choices_are_judged() -> None:
    settings = LayerBench(protocol="domain", batch=2, length=4)
    rows = [row(Point("merge", settings, (2.0,)), TRUE), row(Point("mix", settings, (1.0,)), TRUE)]
    rows[0]["predicted"], rows[1]["predicted"] = 1.0, 1.2  # the slower form looks faster
    found = judge(rows)
    assert found["largest_error"] == {"merge": pytest.approx(0.5), "mix": pytest.approx(0.2)}
    assert found["worst_choice"] == pytest.approx(2.0)


def test_all_points_are_measured_at_a_tiny_size() -> None:
    figures = bench_cost(CostBench(in_features=6, out_features=8, repeats=1))
    assert len(figures["points"]) == len(points())
    assert all(p["seconds"] > 0 for p in figures["points"])
    text = table(figures)
    assert text.count("\n") == len(points()) + 5 and "largest error: merge" in text


def test_the_command_line_refuses_what_is_unknown() -> None:
    found = CliRunner().invoke(app, ["bench", "cost", "--dtype", "float31", "--no-save"])
    assert found.exit_code != 0
