"""Which pictures a comparison gets: those whose numbers are there; of the others, why not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from camex_ft.results.entries import Entry, Result, name_of
from camex_ft.results.plots import curves as curve
from camex_ft.results.plots import data, dots, layers, lines, maps
from camex_ft.results.plots import sweep as swept

ROWS = 8  # of panels in one picture
GROUPS = {"domain": "domains", "label": "labels"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The pictures of a comparison.

    Attributes:
        figures: by name, which is fit for a file's.
        captions: of each figure, what it shows; also its text for those who do not see it.
        left_out: names of pictures that were not made, and why.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, figure: Figure, caption: str) -> None:
        """Take a picture in."""
        self.figures[name], self.captions[name] = figure, caption


def pictures(entries: Sequence[Entry], *, title: str, baseline: str = "dense") -> dict[str, Figure]:
    """Return the pictures that apply, by name; see `choose`."""
    return choose(entries, title=title, baseline=baseline).figures


def choose(entries: Sequence[Entry], *, title: str, baseline: str = "dense") -> Choice:
    """Return the pictures of a comparison, with captions, and of those that lack data the reason.

    Over all tasks: ``comparison``, and ``sweep-KEY`` for each numeric key of the rows that varies. For each task:
    ``loss-TASK``, ``score-TASK``, ``routing-domain-TASK``, ``routing-label-TASK``, ``load-TASK``, ``curvature-TASK``.

    Args:
        entries: cells of the grid; those without a result are passed over.
        title: of the comparison; each picture adds what it shows.
        baseline: label of the row that others are compared with.
    """
    made = Choice()
    found = {task: some for task, some in data.tasks_of(entries).items() if data.done(some)}
    if not found:
        made.left_out["comparison"] = "no run is done yet"
        return made
    _comparison(made, found, title, baseline)
    for key in swept_keys(entries):
        _sweep(made, found, key, title, baseline)
    for task, some in found.items():
        where = f"{title}: {task}" if task not in title else title
        for draw in (_loss, _score, _routing, _load, _curvature):
            draw(made, task, some, where, baseline)
    return made


def source(entries: Sequence[Entry]) -> list[Any]:
    """Return all that the pictures of these entries are drawn from, for `save` and `is_stale`."""
    return [
        {
            "task": e.task,
            "row": e.row,
            "keys": dict(e.keys),
            "seed": e.seed,
            "metrics": result.record.metrics.model_dump(mode="json", exclude={"correct"}),
            "routing": {k: v.model_dump(mode="json") for k, v in result.record.routing.items()},
            "curvature": {k: v.model_dump(mode="json") for k, v in result.record.curvature.items()},
            "history": [dict(line) for line in result.history],
        }
        for e, result in data.done(entries)
    ]


def swept_keys(entries: Sequence[Entry]) -> list[str]:
    """Return the keys of the rows that hold at least two numbers."""
    values: dict[str, set[float]] = {}
    for entry in entries:
        for key, value in entry.keys.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                values.setdefault(key, set()).add(value)
    return sorted(key for key, some in values.items() if len(some) > 1)


def slug(text: str) -> str:
    """Return a text fit for a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")


def _comparison(made: Choice, found: Mapping[str, Sequence[Entry]], title: str, baseline: str) -> None:
    panels = [panel for task, some in found.items() if (panel := data.panel_of(task, some)) is not None]
    made.add(
        "comparison",
        dots.comparison(panels, title=title, baseline=baseline),
        "Best epoch on the validation split: the mean over seeds with its 95% t-interval, and each seed as a ring. "
        "An interval that ends in an arrow goes on. Intervals are of each row by itself: whether two rows "
        "differ is what the paired tests of the table say.",
    )


def _sweep(made: Choice, found: Mapping[str, Sequence[Entry]], key: str, title: str, baseline: str) -> None:
    name = f"sweep-{slug(key)}"
    shown = {task: some for task, entries in found.items() if (some := data.sweep_lines(entries, key))}
    if not shown:
        made.left_out[name] = f"no row has results for two values of {key}"
        return
    y_labels, levels = {}, {}
    for task in shown:
        panel = data.panel_of(task, found[task])
        assert panel is not None
        y_labels[task] = panel.metric
        if baseline in panel.scores and np.isfinite(panel.scores[baseline]).any():
            levels[task] = (baseline, float(np.nanmean(panel.scores[baseline])))
    figure = swept.sweep(
        shown,
        title=f"{title}: {name_of(key)}" if title else name_of(key),
        x_label=key,
        y_labels=y_labels,
        levels=levels,
    )
    made.add(
        name,
        figure,
        f"Best epoch's score against {key}: the mean over seeds, the band one standard deviation either side.",
    )


def _loss(made: Choice, task: str, entries: Sequence[Entry], title: str, baseline: str) -> None:
    name, series = f"loss-{slug(task)}", data.losses(entries)
    if not series:
        made.left_out[name] = "no history was kept beside these records"
        return
    made.add(
        name,
        curve.curves(
            series,
            title=f"{title}, training loss",
            x_label="epoch",
            y_label="training loss",
            baseline=baseline,
        ),
        f"{task}: training loss, the mean over seeds; the band is one standard deviation either side.",
    )


def _score(made: Choice, task: str, entries: Sequence[Entry], title: str, baseline: str) -> None:
    name, series = f"score-{slug(task)}", data.epoch_scores(entries)
    if not any(len(s.x) > 1 for s in series):
        made.left_out[name] = "no run was evaluated more than once"
        return
    label = data.metric_label(data.done(entries)[0][1].record)
    made.add(
        name,
        curve.curves(
            series, title=f"{title}, validation score", x_label="epoch", y_label=label, baseline=baseline
        ),
        f"{task}: {label} on the validation split after every epoch, the mean over seeds; the band is one "
        "standard deviation either side.",
    )


def _one_run(
    entries: Sequence[Entry], has: Callable[[Result], Any]
) -> tuple[dict[str, tuple[Entry, Result]], int]:
    """Return by row the run of lowest seed that has the data, at most `ROWS`, and how many rows have it.

    Runs are not averaged: expert 0 of one seed has nothing to do with expert 0 of another.
    """
    found = {}
    for row, some in data.rows_of(entries).items():
        run = next((pair for pair in some if has(pair[1])), None)
        if run is not None:
            found[row] = run
    return dict(list(found.items())[:ROWS]), len(found)


def _said(runs: Mapping[str, tuple[Entry, Result]], count: int) -> str:
    seeds = sorted({entry.seed for entry, _ in runs.values()})
    words = f"seed {seeds[0]}" if len(seeds) == 1 else f"one seed a row ({', '.join(map(str, seeds))})"
    more = f"; the first {len(runs)} of {count} rows" if count > len(runs) else ""
    return f"One run, {words}, since experts of different seeds do not correspond{more}."


def _routing(made: Choice, task: str, entries: Sequence[Entry], title: str, baseline: str) -> None:
    for kind, plural in GROUPS.items():
        name = f"routing-{kind}-{slug(task)}"
        runs, count = _one_run(entries, lambda r: any(kind in v.by for v in r.record.routing.values()))  # noqa: B023
        if not runs:
            made.left_out[name] = (
                f"the records hold no routing by {kind}: none has experts, its {plural} are not known, or the "
                "record is older"
            )
            continue
        groups, weights = layers.routing_by({row: result for row, (_, result) in runs.items()}, kind)
        made.add(
            name,
            maps.routing(weights, groups, title=f"{title}, routing by {kind}", x_label=kind),
            f"{task}: mean routing weight that each expert gets from the inputs of each {kind}, by layer. "
            + _said(runs, count),
        )


def _load(made: Choice, task: str, entries: Sequence[Entry], title: str, baseline: str) -> None:
    name = f"load-{slug(task)}"
    runs, count = _one_run(entries, lambda r: len(layers.loads(r)[0]) > 1)
    if not runs:
        made.left_out[name] = (
            "no history holds the load of each expert: no experts, no history, or an older run"
        )
        return
    shown = {row: layers.load_of(result) for row, (_, result) in runs.items()}
    made.add(
        name,
        lines.load_over_time(shown, title=f"{title}, load over time"),
        f"{task}: share of the inputs whose largest routing weight is each expert's, stacked from expert 0 at the "
        "bottom, while training. " + _said(runs, count),
    )


def _curvature(made: Choice, task: str, entries: Sequence[Entry], title: str, baseline: str) -> None:
    name = f"curvature-{slug(task)}"
    runs, count = _one_run(entries, lambda r: r.record.curvature)
    if not runs:
        made.left_out[name] = "no row has a curvature"
        return
    made.add(
        name,
        maps.distances(
            {row: layers.distance_of(result) for row, (_, result) in runs.items()},
            title=f"{title}, curvature from the identity",
        ),
        f"{task}: how far each expert's curvature is from the identity, relative, by layer (the mean over its "
        "matrices). " + _said(runs, count),
    )
