"""Pictures of a comparison: those whose numbers are there, and reasons for the others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from camex_ft.results.entries import Entry, Result, name_of
from camex_ft.results.plots import data, dots
from camex_ft.results.plots import sweep as swept
from camex_ft.results.plots.scenes import Choice, Scene, draw_task
from camex_ft.utils.escaping import one_line


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
    made, title, baseline = Choice(), one_line(title), one_line(baseline)
    entries = [replace(e, task=one_line(e.task), row=one_line(e.row)) for e in entries]
    found = {task: some for task, some in data.tasks_of(entries).items() if data.done(some)}
    if not found:
        made.left_out["comparison"] = "no run is done yet"
        return made
    _comparison(made, found, title, baseline)
    for key in swept_keys(entries):
        _sweep(made, found, key, title, baseline)
    for task, some in found.items():
        where = f"{title}: {task}" if task not in title else title
        draw_task(
            made, Scene(task=task, entries=some, title=where, baseline=baseline, suffix=f"-{slug(task)}")
        )
    return made


def of_run(result: Result, *, title: str) -> Choice:
    """Return the pictures of one run, under the names ``loss``, ``score``, ``routing-domain`` and so on."""
    made, record = Choice(), result.record
    task = one_line(record.task)
    entry = Entry(task=task, row=one_line(record.protocol), seed=record.seed, result=result)
    draw_task(made, Scene(task=task, entries=[entry], title=one_line(title)))
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
        _compared(panels),
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
        f"Best score against {key}"
        + (
            ": the mean over seeds, the band one standard deviation either side."
            if any(len(series.values) > 1 for some in shown.values() for series in some)
            else "."
        ),
    )


def _compared(panels: Sequence[data.Panel]) -> str:
    """Return the caption of a comparison: of intervals only what is drawn."""
    if not any(np.isfinite(values).sum() > 1 for panel in panels for values in panel.scores.values()):
        return "Best evaluation on the validation split, one seed a row."
    return (
        "Best evaluation on the validation split: the mean over seeds with its 95% t-interval, and each seed as a "
        "ring. An interval that ends in an arrow goes on. Intervals are of each row by itself: whether two rows "
        "differ is what the paired tests of the table say."
    )
