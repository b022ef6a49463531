"""A score against a number of the configuration, such as alpha or the rank of the curvature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from camex_ft.results.plots.data import Series
from camex_ft.results.plots.style import (
    STEPS,
    Look,
    columns_for,
    drawn,
    hide_rest,
    legend_below,
    looks,
    panels,
)

WIDE = 16  # largest over smallest value from which on the axis is logarithmic


@drawn
def sweep(
    shown: Mapping[str, Sequence[Series]],
    *,
    title: str,
    x_label: str,
    y_labels: Mapping[str, str],
    levels: Mapping[str, tuple[str, float]] | None = None,
) -> Figure:
    """Draw mean and standard deviation over seeds against the swept value: a panel a task, a line a row.

    Args:
        shown: by task, a series a line.
        title, x_label: of the picture; the swept key.
        y_labels: by task, the metric.
        levels: by task, a row that does not have the key, and its mean, drawn as a level line.
    """
    levels = levels or {}
    base = next((name for name, _ in levels.values()), None)
    labels = [s.label for some in shown.values() for s in some]
    found = looks([*labels, *([base] if base else [])], baseline=base)
    columns = columns_for(len(shown))
    figure, axes = panels(-(-len(shown) // columns), columns, height=2.5, title=title)
    lines: dict[str, Line2D] = {}
    for ax, (task, some) in zip(axes.flat, shown.items(), strict=False):
        ax.grid(axis="y")
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=STEPS))
        for series in some:
            lines[series.label] = _line(ax, series, found[series.label])
        if task in levels:
            name, level = levels[task]
            lines[name] = ax.axhline(
                level, color=found[name].colour, linestyle=found[name].line, linewidth=1, label=name
            )
        _ticks(ax, np.unique(np.concatenate([s.x for s in some])))
        ax.set_title(task if len(shown) > 1 else "")
        ax.set_xlabel(x_label)
        ax.set_ylabel(y_labels[task])
    hide_rest(axes, len(shown))
    legend_below(figure, list(lines.values()))
    return figure


def _line(ax: Axes, series: Series, look: Look) -> Line2D:
    middle, spread = series.middle(), series.spread()
    [line] = ax.plot(
        series.x,
        middle,
        color=look.colour,
        linestyle=look.line,
        marker=look.marker,
        label=series.label,
        zorder=3,
    )
    if np.isfinite(spread).any():
        ax.fill_between(
            series.x, middle - spread, middle + spread, color=look.colour, alpha=0.15, linewidth=0, zorder=2
        )
    return line


def _ticks(ax: Axes, values: np.ndarray) -> None:
    """Put ticks at the values that were run."""
    if values.min() > 0 and values.max() / values.min() >= WIDE:
        ax.set_xscale("log", base=2)
    ax.set_xticks(values, [f"{value:g}".replace("-", "−") for value in values])
    ax.minorticks_off()
    ax.tick_params(axis="y", which="minor", left=False)
