"""Search of a method's options, or of the donors' weights, by the primary metric of a validation split.

The specification as it is written comes first, then points of a scrambled Halton sequence, and from the best of these
Nelder-Mead, until the budget is spent. Every point is a merged model that is measured; the best one is taken.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.stats import qmc
from torch import Tensor

from camex_ft.static.merge_inputs import MergeInputs, fill
from camex_ft.static.merge_spec import WEIGHTS, MergeSpec, faults
from camex_ft.static.merge_statistics import prepare_trainer, read_task
from camex_ft.static.methods import Method
from camex_ft.training.callbacks.reporting import only_metrics
from camex_ft.utils.registry import MERGE_METHODS

Blocks = Callable[[str], Iterable[Tensor]]
DIGITS = 4  # of the values that are tried
STEP = 0.15  # of the first simplex, as a share of each range


class _Spent(Exception):
    """The budget of a search is spent."""


@dataclass(frozen=True, kw_only=True)
class SearchPoint:
    """One point of a search.

    Attributes:
        values: option, or ``weights``, -> its value.
        metric: name of the primary metric.
        value: of the metric; None where the point is not valid.
    """

    values: dict[str, Any]
    metric: str
    value: float | None


@dataclass(frozen=True, kw_only=True)
class Space:
    """Ranges of the values that are searched, as a unit cube.

    Attributes:
        ranges: (name, least, greatest) of each dimension; `weights` has one for each donor.
    """

    ranges: tuple[tuple[str, float, float], ...]

    @classmethod
    def of(cls, spec: MergeSpec) -> Space:
        """Return the space that a specification asks for."""
        assert spec.search is not None
        entry: Method = MERGE_METHODS.get(spec.method)
        over = {name: (low, high) for name, (low, high) in (spec.search.over or entry.ranges).items()}
        over = over or {WEIGHTS: (0.0, 1.0)}
        return cls(
            ranges=tuple(
                (name, low, high)
                for name, (low, high) in over.items()
                for _ in range(len(spec.donors) if name == WEIGHTS else 1)
            )
        )

    def values(self, point: Sequence[float]) -> dict[str, Any]:
        """Return the values at a point of the cube."""
        values: dict[str, Any] = {}
        for (name, low, high), share in zip(self.ranges, point, strict=True):
            value = round(low + (high - low) * float(share), DIGITS)
            values[name] = [*values.get(name, []), value] if name == WEIGHTS else value
        return values

    def written(self, spec: MergeSpec) -> dict[str, Any]:
        """Return the values of the specification as it is written."""
        settled = MERGE_METHODS.get(spec.method).settled(spec.options)
        names = dict.fromkeys(name for name, _, _ in self.ranges)
        return {name: list(spec.weights_of("")) if name == WEIGHTS else settled[name] for name in names}


def search(
    spec: MergeSpec,
    inputs: MergeInputs,
    blocks_of: Callable[[MergeSpec], Blocks],
    *,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[MergeSpec, list[SearchPoint]]:
    """Return the specification with the best values, and all that were measured.

    Args:
        spec: with a `search`.
        inputs: start and donors.
        blocks_of: specification -> function that yields the blocks of a merged tensor.
        say: takes a line for each candidate.
    """
    assert spec.search is not None
    layout = inputs.layout
    settled, task = read_task(spec.search.config, spec.search.set, layout.head)
    model = inputs.model(blocks_of(spec))
    with tempfile.TemporaryDirectory() as scratch:
        trainer, data = prepare_trainer(settled, task, model, layout.tokenizer, Path(scratch))
        split, primary = data.primary

        def measure(changed: MergeSpec) -> float:
            fill(model, layout.infos, blocks_of(changed))
            return float(only_metrics(trainer.evaluate())[f"{split}_{primary}"])

        candidates = explore(spec, measure, metric=primary, greater_is_better=data.greater_is_better, say=say)
    best = best_of(candidates, greater_is_better=data.greater_is_better)
    return spec.changed(best.values), candidates


def explore(
    spec: MergeSpec,
    measure: Callable[[MergeSpec], float],
    *,
    metric: str,
    greater_is_better: bool,
    say: Callable[[str], None] = lambda line: None,
) -> list[SearchPoint]:
    """Return the candidates of a search, measured in order; at most `budget` of them."""
    assert spec.search is not None
    space, budget = Space.of(spec), spec.search.budget
    candidates: list[SearchPoint] = []

    def loss(values: dict[str, Any]) -> float:
        known = next((c for c in candidates if c.values == values), None)
        if known is None:
            changed = spec.changed(values)
            value = None if any(faults(changed)) else measure(changed)
            value = value if value is not None and math.isfinite(value) else None
            known = SearchPoint(values=values, metric=metric, value=value)
            candidates.append(known)
            say(candidate_line(len(candidates), known))
        if known.value is None:
            return math.inf
        return -known.value if greater_is_better else known.value

    loss(space.written(spec))
    dimensions = len(space.ranges)
    halton = qmc.Halton(dimensions, seed=spec.search.seed).random(max(1, budget // 2 - 1))
    losses = [loss(space.values(point)) for point in halton]
    if len(candidates) < budget:
        centre = np.asarray(halton[int(np.argmin(losses))])
        steps = np.where(centre + STEP <= 1, STEP, -STEP)
        simplex = np.vstack([centre, centre + np.diag(steps)])

        def limited(point: np.ndarray) -> float:
            if len(candidates) >= budget:
                raise _Spent
            return loss(space.values(point.tolist()))

        with suppress(_Spent):
            minimize(
                limited,
                centre,
                method="Nelder-Mead",
                bounds=[(0, 1)] * dimensions,
                options={"initial_simplex": simplex, "maxfev": 10 * budget, "xatol": 1e-3, "fatol": 0},
            )
    return candidates


def best_of(candidates: Iterable[SearchPoint], *, greater_is_better: bool) -> SearchPoint:
    """Return the best candidate, the first of equals; the one that is written where none has a value."""
    candidates = list(candidates)
    measured = [c for c in candidates if c.value is not None]
    sign = -1 if greater_is_better else 1
    return min(measured, key=lambda c: sign * (c.value or 0.0), default=candidates[0])


def candidate_line(number: int, candidate: SearchPoint) -> str:
    """Return a line on a candidate, for the terminal."""
    values = "  ".join(f"{name} {value}" for name, value in candidate.values.items())
    measured = "not valid" if candidate.value is None else f"{candidate.value:.4f}"
    return f"{number:3}  {candidate.metric} {measured}  {values}"
