"""Protocols compared: a dot for the mean, a line for its interval, small rings for the seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from camex_ft.results.plots.data import Panel, interval
from camex_ft.results.plots.style import (
    BASELINE,
    COLOURS,
    STEPS,
    columns_for,
    drawn,
    hide_rest,
    legend_below,
    panels,
    wrapped,
)

ROW_HEIGHT = 0.27  # inches
LABEL = 2.0  # inches of a row's name


@drawn
def comparison(shown: Sequence[Panel], *, title: str, baseline: str | None = None) -> Figure:
    """Draw the best epoch's score by row: mean, 95% t-interval of the mean over seeds, each seed; a panel a task.

    An interval that would need more than three times the room of the seeds ends in an arrow at the panel's edge.

    Args:
        shown: of one task or several.
        title: of the picture.
        baseline: the row whose mean is drawn as a line through its panel.
    """
    rows = list(dict.fromkeys(row for panel in shown for row in panel.scores))
    if len(shown) == 1:  # the best on top; several tasks share one order
        panel = shown[0]
        rows.sort(key=lambda row: interval(panel.scores[row])[0], reverse=panel.greater)
    columns = columns_for(len(shown))
    count = -(-len(shown) // columns)
    figure, axes = panels(count, columns, height=0.75 + ROW_HEIGHT * len(rows), title=title)
    for i, (ax, panel) in enumerate(zip(axes.flat, shown, strict=False)):
        _panel(ax, panel, rows, baseline)
        ax.set_title(panel.task if len(shown) > 1 else "")
        if i % columns:
            ax.tick_params(labelleft=False)
    hide_rest(axes, len(shown))
    several = any(np.isfinite(values).sum() > 1 for panel in shown for values in panel.scores.values())
    legend_below(figure, _key(baseline if baseline in rows else None, several=several))
    return figure


def _panel(ax: Axes, panel: Panel, rows: Sequence[str], baseline: str | None) -> None:
    ax.set_yticks(range(len(rows)), [wrapped(row, LABEL) for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", linestyle=(0, (1, 2)), color="0.75")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=STEPS))
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(panel.metric)
    low, high = _limits(panel)
    ax.set_xlim(low, high)
    for y, row in enumerate(rows):
        if row in panel.scores:
            _row(ax, y, panel.scores[row], (low, high), is_base=row == baseline)
    if baseline is not None and baseline in panel.scores:
        ax.axvline(
            interval(panel.scores[baseline])[0],
            color=BASELINE,
            linestyle=(0, (2, 1.2)),
            linewidth=1,
            zorder=1,
        )


def _limits(panel: Panel) -> tuple[float, float]:
    """Return the ends of the axis: all seeds, and of the intervals what fits in three times their room."""
    points = np.concatenate([v[np.isfinite(v)] for v in panel.scores.values()])
    if not len(points):
        return 0.0, 1.0
    low, high = points.min(), points.max()
    room = max(high - low, 0.5 if panel.greater else 0.02 * abs(high), 1e-9)
    ends = np.array([interval(v)[1:] for v in panel.scores.values()])
    finite = ends[np.isfinite(ends)]
    if len(finite):
        low = max(low - room, min(low, finite.min()))
        high = min(high + room, max(high, finite.max()))
    return low - 0.06 * room, high + 0.06 * room


def _row(ax: Axes, y: int, values: np.ndarray, limits: tuple[float, float], *, is_base: bool) -> None:
    middle, low, high = interval(values)
    colour = BASELINE if is_base else COLOURS[0]
    if np.isfinite(low):
        ax.plot([max(low, limits[0]), min(high, limits[1])], [y, y], color=colour, linewidth=2, zorder=2)
        for end, marker, outside in ((limits[0], "<", low < limits[0]), (limits[1], ">", high > limits[1])):
            if outside:
                ax.plot(end, y, marker=marker, color=colour, markersize=5, clip_on=False, zorder=4)
    finite = values[np.isfinite(values)]
    ax.plot(
        finite,
        np.full(len(finite), y + 0.24),
        linestyle="",
        marker="o",
        markersize=3.2,
        markerfacecolor="white",
        markeredgecolor="0.4",
        markeredgewidth=0.8,
        zorder=3,
    )
    ax.plot(middle, y, marker="D" if is_base else "o", color=colour, markersize=6, zorder=5)


def _key(baseline: str | None, *, several: bool) -> list[Line2D]:
    word = "mean" if several else "score"
    own = f"{word} and its 95% interval" if several else word
    made = [
        Line2D([], [], color=COLOURS[0], marker="o", linewidth=2 if several else 0, label=own),
        Line2D(
            [], [], linestyle="", marker="o", markersize=3.2, markerfacecolor="white",
            markeredgecolor="0.4", label="one seed",
        ),
    ]  # fmt: skip
    if baseline is not None:
        made.append(
            Line2D(
                [],
                [],
                color=BASELINE,
                linestyle=(0, (2, 1.2)),
                linewidth=1,
                label=f"{'mean' if several else 'score'} of {baseline}",
            )
        )
    return made
