"""Training curves: loss or score over epochs, with a band over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from camex_ft.results.plots.data import Series
from camex_ft.results.plots.style import (
    BASELINE,
    COLOURS,
    STEPS,
    WIDTH,
    Look,
    columns_for,
    drawn,
    hide_rest,
    legend_below,
    looks,
    panels,
    wrapped,
)

TOGETHER = 2  # lines, beside the baseline, whose bands can overlap and still be told apart
ALONE = Look(colour=COLOURS[0], marker="o", line="-")  # in a panel of its own, whose title names it


@drawn
def curves(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, baseline: str | None = None
) -> Figure:
    """Draw mean and standard deviation over seeds; more than two rows get a panel each, the others in grey behind.

    Args:
        series: a line each.
        title, x_label, y_label: with units.
        baseline: label of the row that every panel shows.
    """
    found = looks([s.label for s in series], baseline=baseline)
    rows = [s for s in series if s.label != baseline] or list(series)
    base = next((s for s in series if s.label == baseline and s not in rows), None)
    together = len(rows) <= TOGETHER
    columns = 1 if together else columns_for(len(rows), most=4)
    count = 1 if together else -(-len(rows) // columns)
    figure, axes = panels(
        count, columns, height=3.1 if together else 1.75, title=title, sharex=True, sharey=True
    )
    used = 1 if together else len(rows)
    for i, ax in enumerate(axes.flat[:used]):
        _frame(ax, whole=all(np.allclose(s.x, np.round(s.x)) for s in series))
        if not together:
            for other in rows:
                ax.plot(other.x, other.middle(), color="0.8", linewidth=0.8, zorder=1)
            ax.set_title(wrapped(rows[i].label, (WIDTH - 0.6) / columns))
        lines = [
            _line(ax, s, found[s.label] if together else ALONE) for s in (rows if together else [rows[i]])
        ]
        if base is not None:
            lines.append(_line(ax, base, found[base.label]))
    _labels(figure, axes, used, x_label, y_label)
    hide_rest(axes, used)
    if together:
        if len(series) > 1:
            legend_below(figure, lines)
    else:
        legend_below(figure, _key(base, found))
    return figure


def _frame(ax: Axes, *, whole: bool) -> None:
    ax.grid(axis="y")
    ax.margins(x=0.04)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=STEPS, integer=whole))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=STEPS))


def _line(ax: Axes, series: Series, look: Look) -> Line2D:
    middle, spread = series.middle(), series.spread()
    few = len(series.x) <= 12
    [line] = ax.plot(
        series.x,
        middle,
        color=look.colour,
        linestyle=look.line,
        marker=look.marker if few else "",
        label=series.label,
        zorder=3,
    )
    if np.isfinite(spread).any():
        ax.fill_between(
            series.x, middle - spread, middle + spread, color=look.colour, alpha=0.18, linewidth=0, zorder=2
        )
    return line


def _labels(figure: Figure, axes: np.ndarray, used: int, x_label: str, y_label: str) -> None:
    columns = axes.shape[1]
    for i, ax in enumerate(axes.flat[:used]):
        if i + columns >= used:  # nothing below it
            ax.set_xlabel(x_label)
            ax.tick_params(labelbottom=True)
    if axes.shape[0] == 1:
        axes[0, 0].set_ylabel(y_label)
    else:
        figure.supylabel(y_label, fontsize=8.5)


def _key(base: Series | None, found: dict[str, Look]) -> list[Line2D]:
    made = [Line2D([], [], color="0.8", linewidth=0.8, label="the other rows")]
    if base is not None:
        look = found[base.label]
        made.insert(0, Line2D([], [], color=BASELINE, linestyle=look.line, label=base.label))
    return made
