"""Numbers to draw, gathered from the entries of a comparison and from single runs: NumPy arrays, no Matplotlib.

Scores are in hundredths, as in the tables; scores of which less is better stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from camex_ft.results.entries import Entry, Result, name_of, row_label
from camex_ft.results.record import Record
from camex_ft.utils.escaping import one_line

LEVEL = 0.95  # of an interval
LAYERS = 4  # of a model in one picture


# -- scores and losses over seeds -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: values over x for several seeds."""

    label: str  # of the row
    x: np.ndarray  # [n], ascending
    values: np.ndarray  # [seeds, n]; NaN where a seed has none

    def mean(self) -> np.ndarray:
        """Return the mean over seeds; [n]."""
        return np.ma.masked_invalid(self.values).mean(axis=0).filled(np.nan)

    def sd(self) -> np.ndarray:
        """Return the sample standard deviation over seeds; [n], NaN where fewer than two seeds have a value."""
        return np.ma.masked_invalid(self.values).std(axis=0, ddof=1).filled(np.nan)


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """The best scores of one task: by row, one number a seed, [seeds]; `metric` is the label of the axis."""

    task: str
    metric: str
    greater: bool
    scores: Mapping[str, np.ndarray]

    @property
    def has_several_seeds(self) -> bool:
        """True if a row has scores of more than one seed."""
        return any(np.isfinite(values).sum() > 1 for values in self.scores.values())


def done(entries: Iterable[Entry]) -> list[tuple[Entry, Result]]:
    """Return the entries that have a result, with it."""
    return [(entry, entry.result) for entry in entries if entry.result is not None]


def rows_of(entries: Iterable[Entry]) -> dict[str, list[tuple[Entry, Result]]]:
    """Return the finished entries by row, in order, each row's by seed."""
    by_row: dict[str, list[tuple[Entry, Result]]] = {}
    for entry, result in done(entries):
        by_row.setdefault(entry.row, []).append((entry, result))
    return {row: sorted(pairs, key=lambda pair: pair[0].seed) for row, pairs in by_row.items()}


def score(record: Record, value: float | None) -> float:
    """Return a score as it is drawn: in hundredths where more is better; NaN for None."""
    return np.nan if value is None else value * (100 if record.metrics.greater_is_better else 1)


def metric_label(record: Record) -> str:
    """Return the primary metric with its unit."""
    name = one_line(record.metrics.primary).replace("_", " ")
    return f"{name} × 100" if record.metrics.greater_is_better else f"{name} (less is better)"


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return mean, lower and upper end of the two-sided 95% t-interval of the mean; NaN ends for one value."""
    from scipy import stats

    values = values[np.isfinite(values)]
    mean = float(values.mean()) if len(values) else np.nan
    if len(values) < 2:
        return mean, np.nan, np.nan
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))
    return mean, mean - half, mean + half


def task_scores(task: str, entries: Sequence[Entry]) -> TaskScores:
    """Return a task's best scores by row; at least one entry is done."""
    rows = rows_of(entries)
    record = next(iter(rows.values()))[0][1].record
    return TaskScores(
        task=task,
        metric=metric_label(record),
        greater=record.metrics.greater_is_better,
        scores={
            row: np.array([score(result.record, result.record.metrics.best) for _, result in pairs])
            for row, pairs in rows.items()
        },
    )


def losses(entries: Iterable[Entry]) -> list[Series]:
    """Return the training loss over epochs, a series a row; rows without history are left out."""
    return _series(entries, lambda result: [(line.get("epoch"), line.get("loss")) for line in result.history])


def epoch_scores(entries: Iterable[Entry]) -> list[Series]:
    """Return the primary metric over epochs, a series a row."""

    def points(result: Result) -> list[tuple[float | None, float | None]]:
        record = result.record
        key = primary_key(record) or ""
        lines = [(line.get("epoch"), line.get(key)) for line in record.metrics.per_epoch]
        return [(epoch, score(record, value)) for epoch, value in lines if value is not None]

    return _series(entries, points)


def primary_key(record: Record) -> str | None:
    """Return the key of `per_epoch` with the primary metric of the first validation split; None without one."""
    split = next((name for name in record.data.rows if name.startswith("validation")), "validation")
    key = f"{split}_{record.metrics.primary}"
    return key if any(key in line for line in record.metrics.per_epoch) else None


def _series(
    entries: Iterable[Entry], points: Callable[[Result], list[tuple[float | None, float | None]]]
) -> list[Series]:
    """Return a series of each row's points (x, y); points that lack a coordinate are left out."""
    series = []
    for row, pairs in rows_of(entries).items():
        # a step's epoch is a quotient, which the seeds of a grid share except for rounding
        lines = [
            {round(float(x), 6): float(y) for x, y in points(result) if x is not None and y is not None}
            for _, result in pairs
        ]
        series.append(_joined(row, lines))
    return [line for line in series if len(line.x)]


def _joined(label: str, by_seed: Sequence[Mapping[float, float]]) -> Series:
    """Return the series of several seeds, each x to y."""
    xs = sorted({x for line in by_seed for x in line})
    values = np.array([[line.get(x, np.nan) for x in xs] for line in by_seed])
    return Series(label=label, x=np.array(xs), values=values)


def swept_keys(entries: Sequence[Entry]) -> list[str]:
    """Return the keys of the rows that have at least two different numbers as values."""
    values: dict[str, set[float]] = {}
    for entry in entries:
        for key, value in entry.keys.items():
            if _is_number(value):
                values.setdefault(key, set()).add(value)
    return sorted(key for key, numbers in values.items() if len(numbers) > 1)


def sweep_lines(entries: Sequence[Entry], key: str) -> list[Series]:
    """Return best scores over the values of `key`, a series for each setting of the other keys that has two."""
    lines: dict[str, dict[int, dict[float, float]]] = {}  # by label and seed
    for entry, result in done(entries):
        x = entry.keys.get(key)
        if _is_number(x):
            label = row_label({k: v for k, v in entry.keys.items() if k != key})
            value = score(result.record, result.record.metrics.best)
            lines.setdefault(label or name_of(key), {}).setdefault(entry.seed, {})[float(x)] = value
    series = [_joined(label, [by_seed[s] for s in sorted(by_seed)]) for label, by_seed in lines.items()]
    return [line for line in series if len(line.x) > 1]


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# -- routing and curvature of single runs, by layer -------------------------------------------------------------------


def short_layers(names: Sequence[str]) -> dict[str, str]:
    """Return short names of layers, such as "decoder 3"; the full ones if short ones would not differ."""
    short = {}
    for name in names:
        stack = re.search(r"\b(encoder|decoder)\b", name)
        number = re.search(r"\.(\d+)\b", name)
        short[name] = f"{stack[0] if stack else 'layer'} {number[1]}" if number else name
    return short if len(set(short.values())) == len(short) else {name: name for name in names}


def some_of(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def load_of(result: Result) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return epochs [n] and each expert's share of the groups at every logging step, [n, N], of `LAYERS` layers."""
    lines = [line for line in result.history if line.get("routing_load") and line.get("epoch") is not None]
    names = list(lines[0]["routing_load"]) if lines else []
    lines = [line for line in lines if all(name in line["routing_load"] for name in names)]
    short = short_layers(names)
    return array([line["epoch"] for line in lines]), {
        short[name]: array([line["routing_load"][name] for line in lines]).reshape(len(lines), -1)
        for name in some_of(names, LAYERS)
    }


def routing_by(
    results: Mapping[str, Result], kind: str
) -> tuple[list[str], dict[str, dict[str, np.ndarray]]]:
    """Return the groups of one kind, and by row and layer the mean routing weights, [groups, N]; NaN if unknown."""
    layers = {
        row: {name: layer.by[kind] for name, layer in result.record.routing.items() if kind in layer.by}
        for row, result in results.items()
    }
    groups = list(dict.fromkeys(g for by_layer in layers.values() for by in by_layer.values() for g in by))
    if all(group.lstrip("-").isdigit() for group in groups):
        groups.sort(key=int)
    weights = {}
    for row, by_layer in layers.items():
        short = short_layers(list(by_layer))
        weights[row] = {
            short[name]: _matrix([by_layer[name].get(group) for group in groups])
            for name in some_of(list(by_layer), LAYERS)
        }
    return [one_line(group) for group in groups], weights


def distance_of(result: Result) -> tuple[list[str], np.ndarray]:
    """Return short names of the layers, and the distances of their curvature from the identity; [layers, N]."""
    curvature = result.record.curvature
    names = short_layers(list(curvature))
    return list(names.values()), _matrix([layer.distance for layer in curvature.values()])


def array(rows: Sequence[Any]) -> np.ndarray:
    """Return nested lists as float64, with NaN for None."""
    return np.array(rows, dtype=float)


def _matrix(rows: Sequence[Sequence[float | None] | None]) -> np.ndarray:
    """Return rows of one length as a matrix; a row that is None is all NaN."""
    width = max(len(row) for row in rows if row is not None)
    return array([row or [None] * width for row in rows])
