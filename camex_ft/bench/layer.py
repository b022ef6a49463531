"""``camex-ft bench layer`` and ``cost``: one linear map with experts, against a dense one and the reference.

    dense     y = x W^T                                         one weight W
    merged    s = router(mean of x), y = ExpertLinear(x, s)     the package's own path
    plain     the same s and parameters through `merged_linear_reference`

One call is a forward and a backward pass, to x and to all parameters; or, with `evaluate`, a forward pass alone.

``bench cost`` measures both forms of the merged map over many shapes and fits the cost model to them:

    time = sum of counts times rates        (`camex_ft.moe.merging.functional`)

A shape's time is the lower quartile of all repeats in all rounds. Rates are not negative and minimise the squared
relative error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional as F

from camex_ft.bench.measurement import Side, alternate, medians
from camex_ft.bench.settings import CostBench, LayerBench
from camex_ft.estimate.measured import extra_memory, in_child
from camex_ft.moe.config import LayerSettings
from camex_ft.moe.context import ForwardState
from camex_ft.moe.curvature.kronecker import nearest_factors
from camex_ft.moe.layers.expert_linear import ExpertLinear
from camex_ft.moe.merging import functional as cost
from camex_ft.moe.merging.caching import ParameterCache
from camex_ft.moe.merging.functional import Form, Part, Shape, merged_linear
from camex_ft.moe.merging.reference import merged_linear_reference
from camex_ft.moe.routing.router import Router, masked_mean
from camex_ft.utils.registry import PROTOCOLS

SEED = 0
NOISE = 0.1  # of experts around the base and of curvature around the identity, relative
MB = 1e6
SMALL = 32  # sizes of the call that loads libraries before memory is measured


@dataclass(frozen=True)
class LayerProblem:
    """Inputs and parameters that all sides compute with; the merged side has a forward state with a cache."""

    x: Tensor  # [B, L, in]
    upstream: Tensor  # gradient of the output; [B, L, out]
    weight: Tensor  # of the dense side; [out, in]
    router: Router
    linear: ExpertLinear
    state: ForwardState = field(default_factory=lambda: ForwardState(parameter_cache=ParameterCache()))

    def leaves(self) -> list[Tensor]:
        """Return all tensors that get a gradient."""
        return [self.x, self.weight, *self.router.parameters(), *self.linear.parameters()]


def make(settings: LayerBench) -> LayerProblem:
    """Return inputs and parameters, the same for the same settings; the global random state stays as it is."""
    protocol, dtype = PROTOCOLS.get(settings.protocol), getattr(torch, settings.dtype)
    out, width = settings.out_features, settings.in_features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        weight = torch.randn(out, width) / width**0.5
        x = torch.randn(settings.batch, settings.length, width)
        upstream = torch.randn(settings.batch, settings.length, out)
        router = Router(
            in_features=width, experts=settings.experts, top_k=settings.k, noise=False, prior=False
        )
        layer_settings = LayerSettings(
            rule=protocol.bind({}),
            experts=settings.experts,
            top_k=settings.k,
            base=protocol.base,
            rank=settings.effective_rank,
            curvature=settings.curvature,
            noise=False,
        )
        linear = ExpertLinear(weight, None, layer_settings)
        _move_apart(linear)
    for module in (router, linear):
        module.to(settings.device).train(not settings.evaluate)
    router.to(torch.promote_types(dtype, torch.float32))  # as the layers keep it
    linear.to(dtype)
    x, upstream, weight = (t.to(settings.device, dtype) for t in (x, upstream, weight))
    return LayerProblem(x.requires_grad_(), upstream, weight.requires_grad_(), router, linear)


@torch.no_grad()
def _move_apart(linear: ExpertLinear) -> None:
    for expert in linear.experts:
        expert.add_(torch.randn_like(expert) * (NOISE * expert.std()))
    if linear.curvature is not None:
        for factor in linear.curvature.parameters():
            factor.add_(torch.randn_like(factor) * (NOISE * factor.shape[-1] ** -0.5))


# -- sides ------------------------------------------------------------------------------------------------------------


def dense(p: LayerProblem) -> Tensor:
    """Return x W^T; [B, L, out]."""
    return F.linear(p.x, p.weight)


def merged(p: LayerProblem) -> Tensor:
    """Return the output of the package's layer; [B, L, out]."""
    output: Tensor = p.linear(p.x, route(p), state=p.state)
    return output


def plain(p: LayerProblem) -> Tensor:
    """Return the same by the reference implementation; [B, L, out]."""
    linear = p.linear
    seed = int(torch.randint(2**62, ()).item()) if linear.random and linear.training else 0
    return merged_linear_reference(p.x, route(p).to(linear.experts.dtype), linear.product(seed=seed))


def route(p: LayerProblem) -> Tensor:
    """Return the routing weights of the batch; [B, N]."""
    weights: Tensor = p.router(masked_mean(p.x, None)).weights
    return weights  # [B, N]


SIDES: dict[str, Callable[[LayerProblem], Tensor]] = {"dense": dense, "merged": merged, "plain": plain}


def sides(settings: LayerBench) -> dict[str, Side]:
    """Return the sides of one problem, in the order in which they are timed."""
    problem = make(settings)
    names = [name for name in SIDES if name != "plain" or not settings.skip_plain]
    return {name: side(problem, SIDES[name], evaluate=settings.evaluate) for name in names}


def side(problem: LayerProblem, forward: Callable[[LayerProblem], Tensor], *, evaluate: bool) -> Side:
    """Return one side; in training each call finds changed parameters and no gradients, as after an optimizer step."""

    def run() -> None:
        if evaluate:
            with torch.no_grad():
                forward(problem)
        else:
            forward(problem).backward(problem.upstream)

    @torch.no_grad()
    def prepare() -> None:
        for leaf in () if evaluate else problem.leaves():
            leaf.grad = None
            leaf.mul_(1)  # a change, which empties caches of the layer

    return Side(run, prepare)


# -- measurements -----------------------------------------------------------------------------------------------------


def peak_extra_mb(settings: LayerBench, name: str) -> float:
    """Return the peak memory of one call of a side, in MB (10^6 bytes), beyond parameters, inputs and their gradients.

    With `evaluate` it is that of the first call, so that the layer's cache counts.
    """
    small = {
        key: min(SMALL, getattr(settings, key)) for key in ("batch", "length", "in_features", "out_features")
    }
    side(make(replace(settings, **small)), SIDES[name], evaluate=settings.evaluate).run()
    problem = make(settings)
    if not settings.evaluate:
        for leaf in problem.leaves():
            leaf.grad = torch.zeros_like(leaf)
    run = side(problem, SIDES[name], evaluate=settings.evaluate).run
    return extra_memory(run, device=settings.device) / MB


def bench_layer(settings: LayerBench) -> dict[str, Any]:
    """Return the figures: median seconds of each side, their ratios, peak extra memory in MB, all single times."""
    timed = ("merged",) if settings.skip_plain else ("merged", "plain")
    peaks = {name: in_child(peak_extra_mb, settings, name) for name in timed}
    times = alternate(sides(settings), repeats=settings.repeats, device=settings.device)
    median = medians(times)
    return {
        "dense_s": median["dense"],
        "plain_s": median.get("plain"),
        "merged_s": median["merged"],
        "ratio_plain": median["plain"] / median["merged"] if "plain" in median else None,
        "ratio_dense": median["merged"] / median["dense"],
        "peak_extra_mb_plain": peaks.get("plain"),
        "peak_extra_mb_merged": peaks["merged"],
        "times": times,
    }


# -- cost rates --------------------------------------------------------------------------------------------------------


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
        factors = sum(nearest_factors(s.out_features) + nearest_factors(s.in_features))  # a1 + a2 + c1 + c2
        return Shape(
            groups=s.batch,
            length=s.length,
            out=s.out_features,
            width=s.in_features,
            experts=s.experts,
            used=s.k,
            rank=s.effective_rank,
            factors=factors if s.effective_rank else 0,
        )


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
    rates: dict[Part, dict[str, float]] = {"merge": {}, "mix": {}, "curve": {"factor": 0.0, "vector": 0.0}}
    forms: tuple[Form, ...] = ("merge", "mix")
    for form in forms:
        rates[form] = _solve(form, [p for p in points if p.form == form and not p.settings.effective_rank])
    curved = [p for p in points if p.settings.effective_rank]
    rest = [p.seconds - cost.predict(p.form, p.shape(), rates) for p in curved]
    return {**rates, "curve": _solve("curve", curved, rest)}


def _solve(part: Part, points: Sequence[Point], seconds: Sequence[float] | None = None) -> dict[str, float]:
    """Return the rates of a part that explain the `seconds` of some points, by default all of their times."""
    rows = [cost.counts(part, p.shape()) for p in points]
    weight = 1 / np.array([p.seconds for p in points])
    left = np.array([list(row.values()) for row in rows]) * 1e-9 * weight[:, None]
    solution, _ = nnls(left, np.ones(len(points)) if seconds is None else np.array(seconds) * weight)
    return dict(zip(rows[0], map(float, solution), strict=True))


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
        **dict(zip(SIZES, (s.batch, s.length, s.experts, s.k, s.effective_rank), strict=True)),
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
