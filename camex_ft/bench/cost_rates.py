"""``camex-ft bench cost``: measure both forms of the merged map over many shapes and fit the cost model to them.

    time = sum of counts times rates        (`camex_ft.moe.merging.functional`)

Each point is a forward and a backward pass; its time is the lower quartile of all repeats in all rounds. Rates are not
negative and minimise the squared relative error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from scipy.optimize import nnls
from torch import Tensor

from camex_ft.bench.layer import LayerProblem, make, route, side
from camex_ft.bench.measurement import Side, alternate
from camex_ft.bench.settings import CostBench, LayerBench
from camex_ft.moe.curvature.kronecker import nearest_factors
from camex_ft.moe.merging import functional as cost
from camex_ft.moe.merging.functional import Form, Part, Shape, merged_linear

EXPERTS = (2, 4, 8, 16)
LENGTHS = (32, 64, 128, 256, 512)
SHORT = (4, 8, 16, 32, 64)
ROUNDS = 3  # through all shapes, so that minutes in which the machine is busy do not fall on one of them
SIZES = ("batch", "length", "experts", "top_k", "rank")  # of a point
RANKS = ((4, 1), (8, 1), (8, 2), (4, 8))  # experts, rank


@dataclass(frozen=True)
class Point:
    """One form at one shape, and its times in seconds."""

    form: Form
    settings: LayerBench
    times: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The lower quartile of the times: a busy machine only adds, and the least is luck."""
        return float(np.quantile(self.times, 0.25))

    def shape(self) -> Shape:
        """Return the sizes that the cost model predicts from."""
        s = self.settings
        return Shape(
            groups=s.batch,
            length=s.length,
            out=s.out_features,
            width=s.in_features,
            experts=s.experts,
            used=s.k,
            rank=s.effective_rank,
            factors=_factors(s),
        )


def _factors(settings: LayerBench) -> int:
    """Return a1 + a2 + c1 + c2, or 0 without curvature."""
    sizes = (settings.out_features, settings.in_features)
    return sum(sum(nearest_factors(size)) for size in sizes) if settings.effective_rank else 0


def grid(settings: CostBench) -> list[tuple[tuple[Form, ...], LayerBench]]:
    """Return the shapes to measure and the forms that are compared at each."""
    base = LayerBench(**{field.name: getattr(settings, field.name) for field in fields(LayerBench)})
    both: tuple[Form, ...] = ("merge", "mix")
    one: tuple[Form, ...] = ("merge",)
    points = [(one, replace(base, batch=8, length=length, experts=n)) for n in EXPERTS for length in LENGTHS]
    points += [
        (both, replace(base, batch=32, length=length, experts=n, top_k=k))
        for n, k in ((4, 4), (8, 8), (8, 2))
        for length in SHORT
    ]
    points += [
        (one, replace(base, protocol="domain-ca", batch=8, length=64, experts=n, rank=rank))
        for n, rank in RANKS
    ]
    return points


def forced(form: Form) -> Callable[[LayerProblem], Tensor]:
    """Return a side of the layer benchmark in one form."""

    def forward(p: LayerProblem) -> Tensor:
        return merged_linear(p.x, route(p), replace(p.linear.product(), multiplier=None, form=form))

    return forward


def measure(forms: Sequence[Form], settings: LayerBench) -> list[Point]:
    """Return the times of some forms at one shape, measured in turns."""
    problem = make(settings)
    sides: dict[str, Side] = {form: side(problem, forced(form), evaluate=False) for form in forms}
    times = alternate(sides, repeats=settings.repeats, device=settings.device)
    return [Point(form, settings, tuple(times[form])) for form in forms]


def fit(points: Sequence[Point]) -> dict[Part, dict[str, float]]:
    """Return the rates, in ns a count: of each form from the points without curvature, then of the curvature."""
    rates: dict[Part, dict[str, float]] = {"merge": {}, "mix": {}, "curve": {}}
    forms: tuple[Form, ...] = ("merge", "mix")
    for form in forms:
        chosen = [p for p in points if p.form == form and not p.settings.effective_rank]
        rates[form] = _solve(form, chosen, [p.seconds for p in chosen], [p.seconds for p in chosen])
    curved = [p for p in points if p.settings.effective_rank]
    zero: dict[Part, dict[str, float]] = {**rates, "curve": {"factor": 0.0, "vector": 0.0}}
    rest = [p.seconds - cost.predict(p.form, p.shape(), zero) for p in curved]
    rates["curve"] = _solve("curve", curved, rest, [p.seconds for p in curved])
    return rates


def _solve(
    part: Part, points: Sequence[Point], seconds: Sequence[float], scale: Sequence[float]
) -> dict[str, float]:
    rows = [cost.counts(part, p.shape()) for p in points]
    names = list(rows[0])
    weight = 1 / np.array(scale)
    left = np.array([[row[name] for name in names] for row in rows]) * 1e-9 * weight[:, None]
    solution, _ = nnls(left, np.array(seconds) * weight)
    return dict(zip(names, map(float, solution), strict=True))


def bench_cost(settings: CostBench) -> dict[str, Any]:
    """Return the rates, how well they predict and choose, and all points."""
    rounds = [
        [point for forms, each in grid(settings) for point in measure(forms, each)] for _ in range(ROUNDS)
    ]
    points = [
        replace(same[0], times=tuple(t for point in same for t in point.times))
        for same in zip(*rounds, strict=True)
    ]
    rates = fit(points)
    return {"rates": rates, **judge([row(p, rates) for p in points])}


def row(point: Point, rates: Mapping[Part, Mapping[str, float]]) -> dict[str, Any]:
    """Return an entry of the record."""
    s = point.settings
    return {
        "form": point.form,
        "batch": s.batch,
        "length": s.length,
        "experts": s.experts,
        "top_k": s.k,
        "rank": s.effective_rank,
        "seconds": point.seconds,
        "predicted": cost.predict(point.form, point.shape(), rates),
        "times": list(point.times),
    }


def judge(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the errors of the predictions of some rows, and the rows.

    ``largest_error`` is |predicted / measured - 1|; ``worst_choice`` the measured time of the form that is predicted to
    be faster, over that of the faster one.
    """
    errors: dict[str, float] = {}
    shapes: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for point in rows:
        error = abs(point["predicted"] / point["seconds"] - 1)
        errors[point["form"]] = max(error, errors.get(point["form"], 0.0))
        shapes.setdefault(tuple(point[name] for name in SIZES), []).append(point)
    worst = 1.0
    for forms in shapes.values():
        chosen = min(forms, key=lambda point: point["predicted"])
        worst = max(worst, chosen["seconds"] / min(point["seconds"] for point in forms))
    return {"largest_error": errors, "worst_choice": worst, "points": list(rows)}


def table(record: Mapping[str, Any]) -> str:
    """Return the record as text: a line a point, then rates and errors."""
    lines = ["form   batch  length  experts  top_k  rank   seconds  predicted"]
    for p in record["points"]:
        sizes = "  ".join(f"{p[key]:5d}" for key in SIZES)
        lines.append(f"{p['form']:5s}  {sizes}  {p['seconds']:8.4f}  {p['predicted']:8.4f}")
    for part, rates in record["rates"].items():
        lines.append(f"{part}: " + ", ".join(f"{name} {rate:.4g} ns" for name, rate in rates.items()))
    lines.append("largest error: " + ", ".join(f"{k} {v:.0%}" for k, v in record["largest_error"].items()))
    lines.append(f"worst choice: {record['worst_choice']:.3g} times the faster form")
    return "\n".join(lines)
