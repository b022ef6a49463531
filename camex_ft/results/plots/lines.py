"""Load over time, and the spectrum of the curvature: many values a layer, one panel each."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

from camex_ft.results.plots.style import (
    LINES,
    SEQUENTIAL,
    STEPS,
    WIDTH,
    columns_for,
    drawn,
    hide_rest,
    panels,
    wrapped,
)

NUMBERED = 0.09  # of the panel's height: an expert's band is high enough for its number


@drawn
def load_over_time(shown: Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]], *, title: str) -> Figure:
    """Draw each expert's share of the groups during training, stacked: a row of panels a protocol, a panel a layer.

    Args:
        shown: by row, epochs [n] and by layer shares [n, N].
        title: of the picture.
    """
    rows, layers = list(shown), list(next(iter(shown.values()))[1])
    figure, axes = panels(len(rows), len(layers), height=1.45, title=title, sharey=True)
    for i, row in enumerate(rows):
        epochs, by_layer = shown[row]
        for j, layer in enumerate(layers):
            ax: Axes = axes[i, j]
            if layer not in by_layer:
                ax.set_axis_off()
                continue
            _stack(ax, epochs, by_layer[layer])
            if i == 0:
                ax.set_title(layer)
            if i == len(rows) - 1:
                ax.set_xlabel("epoch")
            if j == 0:
                ax.set_ylabel(f"{wrapped(row, 1.3)}\nshare of inputs" if len(rows) > 1 else "share of inputs")
    return figure


def _stack(ax: Axes, x: np.ndarray, shares: np.ndarray) -> None:
    """Draw experts from the bottom up, a line between each two, their numbers at the right end."""
    count = shares.shape[1]
    colours = matplotlib.colormaps[SEQUENTIAL](np.linspace(0.08, 0.92, count))
    edges = np.vstack([np.zeros(len(x)), np.cumsum(shares, axis=1).T])
    for k in range(count):
        ax.fill_between(x, edges[k], edges[k + 1], color=colours[k], linewidth=0)
        ax.plot(x, edges[k + 1], color="white", linewidth=0.8)
        if edges[k + 1, -1] - edges[k, -1] >= NUMBERED:
            middle = (edges[k, -1] + edges[k + 1, -1]) / 2
            ax.annotate(
                str(k), (1, middle), xycoords=("axes fraction", "data"), xytext=(3, 0),
                textcoords="offset points", va="center", fontsize=7,
            )  # fmt: skip
    ax.set_xlim(x[0], x[-1] if x[-1] > x[0] else x[0] + 1)
    ax.set_ylim(0, 1)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=STEPS))
    ax.yaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


@drawn
def spectrum(shown: Mapping[str, np.ndarray], *, title: str, columns: int | None = None) -> Figure:
    """Draw the singular values of every M_i, largest first, a panel a matrix; 1 is the identity's.

    Args:
        shown: by matrix; [N, n].
        title: of the picture.
        columns: of panels; by default what makes the picture nearly square.
    """
    columns = columns or columns_for(len(shown))
    rows = -(-len(shown) // columns)
    width = WIDTH * min(1.0, (columns + 0.8) / 3)
    room = 0.075 * max(float(np.ptp(np.concatenate([v.ravel() for v in shown.values()]))), 1e-9)
    figure, axes = panels(rows, columns, height=1.9, title=title, width=width, sharey=True)
    for k, (ax, (name, values)) in enumerate(zip(axes.flat, shown.items(), strict=False)):
        _experts(ax, values, room=room)
        ax.set_title(name)
        if k + columns >= len(shown):
            ax.set_xlabel("share of the values")
        if k % columns == 0:
            ax.set_ylabel("singular value of Mᵢ")
    hide_rest(axes, len(shown))
    return figure


def _experts(ax: Axes, values: np.ndarray, *, room: float) -> None:
    count, n = values.shape
    place = np.linspace(0, 1, n) if n > 1 else np.array([0.5])
    colours = matplotlib.colormaps[SEQUENTIAL](np.linspace(0.05, 0.8, count))
    for k in range(count):
        ax.plot(place, values[k], color=colours[k], linestyle=LINES[k % len(LINES)], linewidth=1.1)
    ends = _apart(values[:, -1], room=room)
    for k in range(count):
        ax.annotate(
            str(k), (1, ends[k]), xytext=(3, 0), textcoords="offset points", va="center", fontsize=6.5,
            color=colours[k],
        )  # fmt: skip
    ax.axhline(1, color="0.4", linewidth=0.8, linestyle=(0, (2, 1.5)), zorder=1)
    ax.grid(axis="y")
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=STEPS))
    ax.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
    ax.margins(x=0.02)


def _apart(values: np.ndarray, *, room: float) -> np.ndarray:
    """Return places for labels near `values`, in their order and at least `room` apart."""
    order = np.argsort(values, kind="stable")
    placed = values[order].astype(float)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + room)
    placed -= (placed - values[order]).mean()
    made = np.empty_like(placed)
    made[order] = placed
    return made
