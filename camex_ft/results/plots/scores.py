"""Pictures of scores and losses over seeds: curves over epochs, sweeps of a key, and the rows compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from camex_ft.results.plots.figures import (
    BASELINE,
    BASELINE_DASHES,
    COLOURS,
    WIDTH,
    Look,
    columns_for,
    label_edges,
    legend_below,
    looks,
    styled,
    tiles,
    wrapped,
)
from camex_ft.results.plots.series import Series, TaskScores, interval

TOGETHER = 2  # rows, beside the baseline, whose bands overlap and can still be told apart
ALONE = Look(COLOURS[0], "o", "-")  # of a row in its own panel, whose title names it
FEW = 12  # points of a line that still get markers
LOGARITHMIC = 16  # largest over smallest value of a sweep from which on its axis is logarithmic
ROW_HEIGHT, ROW_LABEL = 0.27, 2.0  # inches of a row and of its name in a comparison
SEED: dict[str, Any] = {
    "marker": "o",
    "markersize": 3.2,
    "markerfacecolor": "white",
    "markeredgecolor": "0.4",
    "linestyle": "",
}


def _line(ax: Axes, series: Series, look: Look) -> Line2D:
    """Draw the mean over seeds, with a band of one standard deviation either side."""
    mean, sd = series.mean(), series.sd()
    marker = look.marker if len(series.x) <= FEW else ""
    [line] = ax.plot(
        series.x, mean, label=series.label, color=look.colour, ls=look.dashes, marker=marker, zorder=3
    )
    if np.isfinite(sd).any():
        ax.fill_between(series.x, mean - sd, mean + sd, color=look.colour, alpha=0.18, linewidth=0, zorder=2)
    return line


@styled
def curves(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, baseline: str | None = None
) -> Figure:
    """Draw mean and standard deviation over seeds; more than two rows get a panel each, the others in grey behind.

    Every panel shows the row `baseline`.
    """
    by_label = looks([s.label for s in series], baseline=baseline)
    rows = [s for s in series if s.label != baseline] or list(series)
    base = [s for s in series if s.label == baseline and s not in rows]
    options: dict[str, Any] = {"title": title, "sharex": True, "sharey": True}
    lines: list[Line2D] = []
    if len(rows) <= TOGETHER:
        columns = 1
        figure, axes = tiles(1, 1, height=3.1, **options)
        lines = [_line(axes[0], s, by_label[s.label]) for s in [*rows, *base]]
        legend_below(figure, lines if len(series) > 1 else [])
    else:
        columns = columns_for(len(rows), most=4)
        figure, axes = tiles(len(rows), columns, height=1.75, **options)
        for ax, row in zip(axes, rows, strict=True):
            for other in rows:
                ax.plot(other.x, other.mean(), color="0.8", linewidth=0.8, zorder=1)
            ax.set_title(wrapped(row.label, (WIDTH - 0.6) / columns))
            lines = [_line(ax, s, by_label[s.label] if s in base else ALONE) for s in [row, *base]]
        others = Line2D([], [], color="0.8", linewidth=0.8, label="the other rows")
        legend_below(figure, [*lines[1:], others])
    whole = all(np.allclose(s.x, np.round(s.x)) for s in series)
    for ax in axes:
        ax.grid(axis="y")
        ax.margins(x=0.04)
        ax.locator_params(axis="x", nbins=6, integer=whole)
        ax.locator_params(axis="y", nbins=5)
    label_edges(axes, columns, x=x_label, y=y_label if len(axes) <= columns else "")
    if len(axes) > columns:
        figure.supylabel(y_label, fontsize=8.5)
    return figure


@styled
def sweep(
    shown: Mapping[str, Sequence[Series]],
    *,
    title: str,
    x_label: str,
    y_labels: Mapping[str, str],
    levels: Mapping[str, tuple[str, float]] | None = None,
) -> Figure:
    """Draw mean and standard deviation over seeds against the swept value: a panel a task, a line a row.

    `levels` are, by task, a row that does not have the key and its mean, drawn as a level line.
    """
    levels = levels or {}
    base = next((name for name, _ in levels.values()), None)
    labels = [s.label for lines in shown.values() for s in lines]
    by_label = looks([*labels, *([base] if base else [])], baseline=base)
    columns = columns_for(len(shown))
    figure, axes = tiles(len(shown), columns, height=2.5, title=title)
    drawn: dict[str, Line2D] = {}
    for ax, (task, lines) in zip(axes, shown.items(), strict=True):
        ax.grid(axis="y")
        ax.locator_params(axis="y", nbins=5)
        drawn |= {series.label: _line(ax, series, by_label[series.label]) for series in lines}
        if task in levels:
            name, level = levels[task]
            look = by_label[name]
            drawn[name] = ax.axhline(level, label=name, color=look.colour, ls=look.dashes, linewidth=1)
        values = np.unique(np.concatenate([s.x for s in lines]))
        if values.min() > 0 and values.max() / values.min() >= LOGARITHMIC:
            ax.set_xscale("log", base=2)
        ax.set_xticks(values, [f"{value:g}".replace("-", "−") for value in values])
        ax.minorticks_off()
        ax.set(title=task if len(shown) > 1 else "", xlabel=x_label, ylabel=y_labels[task])
    legend_below(figure, list(drawn.values()))
    return figure


# -- rows compared ----------------------------------------------------------------------------------------------------


@styled
def comparison(shown: Sequence[TaskScores], *, title: str, baseline: str | None = None) -> Figure:
    """Draw the best epoch's score by row: mean, 95% t-interval of the mean over seeds, each seed; a panel a task.

    An interval that would need more than three times the room of the seeds ends in an arrow at the panel's edge. The
    mean of the row `baseline` is drawn as a line through its panel.
    """
    rows = list(dict.fromkeys(row for task in shown for row in task.scores))
    if len(shown) == 1:  # the best on top; several tasks share one order
        [task] = shown
        rows.sort(key=lambda row: interval(task.scores[row])[0], reverse=task.greater)
    columns = columns_for(len(shown))
    figure, axes = tiles(len(shown), columns, height=0.75 + ROW_HEIGHT * len(rows), title=title)
    for i, (ax, task) in enumerate(zip(axes, shown, strict=True)):
        _rows(ax, task, rows, baseline)
        ax.set(xlabel=task.metric, title=task.task if len(shown) > 1 else "")
        ax.tick_params(labelleft=i % columns == 0)
    several = any(task.has_several_seeds for task in shown)
    word = "mean" if several else "score"
    own = f"{word} and its 95% interval" if several else word
    key = [
        Line2D([], [], color=COLOURS[0], marker="o", linewidth=2 if several else 0, label=own),
        Line2D([], [], label="one seed", **SEED),
    ]
    if baseline in rows:
        name = f"{word} of {baseline}"
        key.append(Line2D([], [], label=name, color=BASELINE, ls=BASELINE_DASHES, linewidth=1))
    legend_below(figure, key)
    return figure


def _rows(ax: Axes, task: TaskScores, rows: Sequence[str], baseline: str | None) -> None:
    """Draw the rows of one task from top to bottom."""
    ax.set_yticks(range(len(rows)), [wrapped(row, ROW_LABEL) for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", linestyle=(0, (1, 2)), color="0.75")
    ax.locator_params(axis="x", nbins=5)
    ax.spines["left"].set_visible(False)
    left, right = _limits(task)
    ax.set_xlim(left, right)
    for y, row in enumerate(rows):
        if row not in task.scores:
            continue
        values = task.scores[row]
        mean, low, high = interval(values)
        colour = BASELINE if row == baseline else COLOURS[0]
        if np.isfinite(low):
            ax.plot([max(low, left), min(high, right)], [y, y], color=colour, linewidth=2, zorder=2)
        for end, marker, is_cut in ((left, "<", low < left), (right, ">", high > right)):
            if is_cut:
                ax.plot(end, y, marker=marker, color=colour, markersize=5, clip_on=False, zorder=4)
        ax.plot(values, np.full(len(values), y + 0.24), markeredgewidth=0.8, zorder=3, **SEED)
        ax.plot(mean, y, marker="D" if row == baseline else "o", color=colour, markersize=6, zorder=5)
        if row == baseline:
            ax.axvline(mean, color=BASELINE, linestyle=BASELINE_DASHES, linewidth=1, zorder=1)


def _limits(task: TaskScores) -> tuple[float, float]:
    """Return the ends of the axis: all seeds, and as much of the intervals as fits in three times their room."""
    points = np.concatenate([values[np.isfinite(values)] for values in task.scores.values()])
    if not len(points):
        return 0.0, 1.0
    low, high = points.min(), points.max()
    room = max(high - low, 0.5 if task.greater else 0.02 * abs(high), 1e-9)
    ends = np.array([interval(values)[1:] for values in task.scores.values()])
    ends = ends[np.isfinite(ends)]
    if len(ends):
        low = max(low - room, min(low, ends.min()))
        high = min(high + room, max(high, ends.max()))
    return low - 0.06 * room, high + 0.06 * room
