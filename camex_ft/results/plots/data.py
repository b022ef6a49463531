"""Numbers to draw, gathered from the entries of a comparison: NumPy arrays, no Matplotlib.

Scores are in hundredths, as in the tables; those of which less is better stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from camex_ft.results.entries import Entry, Result, name_of, row_label
from camex_ft.results.record import Record
from camex_ft.utils.escaping import one_line

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: values over x for several seeds.

    Attributes:
        label: of the row.
        x: [n], ascending.
        values: [seeds, n]; NaN where a seed has none.
    """

    label: str
    x: np.ndarray
    values: np.ndarray

    def middle(self) -> np.ndarray:
        """Return the mean over seeds; [n]."""
        return _over_seeds(np.nanmean, self.values)

    def spread(self) -> np.ndarray:
        """Return the sample standard deviation over seeds; [n], NaN where fewer than two seeds have a value."""
        count = np.isfinite(self.values).sum(0)
        made = np.full(self.values.shape[1], np.nan)
        some = count > 1
        if some.any():
            made[some] = np.nanstd(self.values[:, some], axis=0, ddof=1)
        return made


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The scores of one task.

    Attributes:
        task: its id.
        metric: the axis's label.
        greater: whether more is better.
        scores: by row, one number a seed; [seeds].
    """

    task: str
    metric: str
    greater: bool
    scores: Mapping[str, np.ndarray]


def _over_seeds(function: Any, values: np.ndarray) -> np.ndarray:
    made = np.full(values.shape[1], np.nan)
    some = np.isfinite(values).any(0)
    if some.any():
        made[some] = function(values[:, some], axis=0)
    return made


def done(entries: Iterable[Entry]) -> list[tuple[Entry, Result]]:
    """Return the entries that have a result, and it."""
    return [(entry, entry.result) for entry in entries if entry.result is not None]


def tasks_of(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Return the entries by task, in order."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.task, []).append(entry)
    return found


def rows_of(entries: Iterable[Entry]) -> dict[str, list[tuple[Entry, Result]]]:
    """Return the finished entries by row, in order, each row's by seed."""
    found: dict[str, list[tuple[Entry, Result]]] = {}
    for entry, result in done(entries):
        found.setdefault(entry.row, []).append((entry, result))
    return {row: sorted(some, key=lambda pair: pair[0].seed) for row, some in found.items()}


def score(record: Record, value: float | None) -> float:
    """Return a score as it is drawn: in hundredths where more is better; NaN for None."""
    if value is None:
        return float("nan")
    return 100 * value if record.metrics.greater_is_better else value


def metric_label(record: Record) -> str:
    """Return the primary metric with its unit."""
    name = one_line(record.metrics.primary).replace("_", " ")
    return f"{name} × 100" if record.metrics.greater_is_better else f"{name} (less is better)"


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return mean, lower and upper end of the two-sided 95% t-interval of the mean; NaN ends for one value."""
    from scipy import stats

    values = values[np.isfinite(values)]
    if not len(values):
        return (float("nan"),) * 3
    middle = float(values.mean())
    if len(values) < 2:
        return middle, float("nan"), float("nan")
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return middle, middle - half, middle + half


def panel_of(task: str, entries: Sequence[Entry]) -> Panel | None:
    """Return a task's best scores by row, or None where no entry is done."""
    rows = rows_of(entries)
    if not rows:
        return None
    record = next(iter(rows.values()))[0][1].record
    scores = {
        row: np.array([score(result.record, result.record.metrics.best) for _, result in some])
        for row, some in rows.items()
    }
    return Panel(
        task=task, metric=metric_label(record), greater=record.metrics.greater_is_better, scores=scores
    )


def losses(entries: Iterable[Entry]) -> list[Series]:
    """Return the training loss over epochs, a series a row; rows without history are left out."""
    return _series(
        entries,
        lambda result: [
            (line["epoch"], line["loss"])
            for line in result.history
            if line.get("loss") is not None and line.get("epoch") is not None
        ],
    )


def epoch_scores(entries: Iterable[Entry]) -> list[Series]:
    """Return the primary metric over epochs, a series a row."""

    def points(result: Result) -> list[tuple[float, float]]:
        record = result.record
        key = primary_key(record)
        return [
            (epoch, score(record, line[key]))
            for line in record.metrics.per_epoch
            if key is not None and (epoch := line.get("epoch")) is not None and line.get(key) is not None
        ]

    return _series(entries, points)


def primary_key(record: Record) -> str | None:
    """Return the key of `per_epoch` that holds the primary metric of the split that decides; None without one."""
    split = next((name for name in record.data.rows if name.startswith("validation")), "validation")
    key = f"{split}_{record.metrics.primary}"
    return key if any(key in line for line in record.metrics.per_epoch) else None


def _series(entries: Iterable[Entry], points: Any) -> list[Series]:
    made = []
    for row, some in rows_of(entries).items():
        # a step's epoch is a quotient, which seeds of one grid share but for rounding
        lines = [{round(float(x), 6): float(y) for x, y in points(result)} for _, result in some]
        x = sorted({at for line in lines for at in line})
        if x:
            values = np.array([[line.get(at, np.nan) for at in x] for line in lines])
            made.append(Series(label=row, x=np.array(x), values=values))
    return made


def sweep_lines(entries: Sequence[Entry], key: str) -> list[Series]:
    """Return a series of best scores over the values of `key` for each way to set the other keys, where it has two."""
    lines: dict[str, dict[float, dict[int, float]]] = {}
    for entry, result in done(entries):
        x = entry.keys.get(key)
        if isinstance(x, (int, float)) and not isinstance(x, bool):
            label = row_label({k: v for k, v in entry.keys.items() if k != key})
            value = score(result.record, result.record.metrics.best)
            lines.setdefault(label or name_of(key), {}).setdefault(float(x), {})[entry.seed] = value
    made = []
    for label, by_x in lines.items():
        seeds = sorted({seed for some in by_x.values() for seed in some})
        xs = sorted(by_x)
        if len(xs) > 1:
            values = np.array([[by_x[x].get(seed, np.nan) for x in xs] for seed in seeds])
            made.append(Series(label=label, x=np.array(xs), values=values))
    return made
