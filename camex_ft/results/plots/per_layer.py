"""Pictures with a panel a layer: routing, load, curvature and similarity of the experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import PercentFormatter

from camex_ft.results.plots.figures import (
    BASELINE_DASHES,
    DASHES,
    SEQUENTIAL,
    WIDTH,
    columns_for,
    label_edges,
    panels,
    styled,
    tiles,
    wrapped,
)

LETTER, NUMBER = 0.085, 0.27  # inches of a tick's letter and of a number in a cell
FINE = 0.2  # range of values below which numbers have three places
NUMBERED = 0.09  # of a panel's height: an expert's band is high enough for its number

T = TypeVar("T")


# -- heat maps --------------------------------------------------------------------------------------------------------


@styled
def routing(
    weights: Mapping[str, Mapping[str, np.ndarray]], groups: Sequence[str], *, title: str, x_label: str
) -> Figure:
    """Draw the mean routing weight of each group of inputs: a row of panels a protocol, a panel a layer.

    Weights are by row and layer, [groups, N]; groups are names of domains or labels.
    """
    layers = len(next(iter(weights.values())))
    matrices = [matrix for by_layer in weights.values() for matrix in by_layer.values()]
    experts = max(matrix.shape[1] for matrix in matrices)
    top = max(float(np.nanmax(matrix)) for matrix in matrices)
    cell = (WIDTH - 1.4) / (layers * len(groups))  # inches
    longest = max(map(len, groups))
    is_turned = longest * LETTER > cell
    height = 0.2 + 0.19 * max(experts, 4)
    figure, axes = panels(len(weights), layers, height=height, title=title, sharex=True, sharey="row")
    figure.set_figheight(figure.get_figheight() + 0.5 + (LETTER * longest if is_turned else 0.1))
    for ax, matrix in _by_row_and_layer(axes, weights, x=x_label, y="expert", label_width=height):
        _image(ax, matrix.T, high=top, numbers=cell >= NUMBER)
        ax.set_xticks(range(len(groups)), groups, rotation=90 if is_turned else 0)
        ax.set_yticks(range(matrix.shape[1]))
    _colour_bar(figure, axes.flat, "mean routing weight")
    return figure


@styled
def distances(shown: Mapping[str, tuple[Sequence[str], np.ndarray]], *, title: str) -> Figure:
    """Draw ||M_i - I||_F / ||I||_F: a panel a row, with names of layers and distances [layers, N], on one scale."""
    columns = columns_for(len(shown))
    height = 0.4 + 0.2 * max(len(names) for names, _ in shown.values())
    width = WIDTH if len(shown) > 1 else 0.75 * WIDTH
    figure, axes = tiles(len(shown), columns, height=height, title=title, width=width)
    figure.set_figheight(figure.get_figheight() + 0.75)
    top = max(float(np.nanmax(values)) for _, values in shown.values()) or 1.0
    before: Sequence[str] = ()
    for k, (ax, (row, (names, values))) in enumerate(zip(axes, shown.items(), strict=True)):
        cell = 0.7 * WIDTH / (columns * values.shape[1])
        _image(ax, values, high=top, numbers=cell >= NUMBER * (1 if top >= FINE else 1.3))
        ax.set_xticks(range(values.shape[1]))
        ax.set_yticks(range(len(names)), names if k % columns == 0 or names != before else [])
        ax.set_title(wrapped(row, (WIDTH - 1) / columns) if len(shown) > 1 else "")
        before = names
    label_edges(axes, columns, x="expert")
    _colour_bar(figure, axes, "‖Mᵢ − I‖ / ‖I‖")
    return figure


@styled
def similarity(matrices: Mapping[str, np.ndarray], *, title: str) -> Figure:
    """Draw the cosine similarity of domain vectors, a panel a layer, [N, N], from -1 to 1."""
    columns = min(4, len(matrices))
    width = WIDTH if columns > 2 else 0.8 * WIDTH
    side = min(2.4, (width - 0.6) / columns - 0.25)
    figure, axes = tiles(len(matrices), columns, height=side + 0.4, title=title, width=width)
    figure.set_figheight(figure.get_figheight() + 0.5)
    for ax, (layer, matrix) in zip(axes, matrices.items(), strict=True):
        _image(ax, matrix, low=-1.0, high=1.0, numbers=side / len(matrix) >= NUMBER)
        ax.set(title=layer, aspect="equal", xticks=range(len(matrix)), yticks=range(len(matrix)))
    label_edges(axes, columns, x="expert", y="expert")
    _colour_bar(figure, axes, "cosine similarity")
    return figure


def _image(ax: Axes, values: np.ndarray, *, low: float = 0.0, high: float, numbers: bool) -> None:
    """Draw a matrix, with thin white lines between its cells and, if they fit, its numbers."""
    ax.imshow(values, cmap=SEQUENTIAL, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(values.shape[1] - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(values.shape[0] - 1) + 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=0.6)
    ax.tick_params(which="both", length=0)
    if not numbers:
        return
    places = 2 if high - low >= FINE else 3
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            is_dark = (value - low) / max(high - low, 1e-12) < 0.55
            text, colour = f"{value:.{places}f}".replace("-", "−"), "white" if is_dark else "black"
            ax.text(j, i, text, ha="center", va="center", fontsize=6.5, color=colour)


def _colour_bar(figure: Figure, axes: Iterable[Axes], label: str) -> None:
    """Put the colour bar of all images, which share one scale, below them."""
    image: AxesImage = next(image for ax in axes for image in ax.images)
    pad = 0.1 / figure.get_figheight()
    figure.colorbar(image, ax=figure.axes, label=label, location="bottom", shrink=0.45, aspect=28, pad=pad)


# -- lines ------------------------------------------------------------------------------------------------------------


@styled
def load_over_time(shown: Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]], *, title: str) -> Figure:
    """Draw each expert's share of the groups during training, stacked: a row of panels a protocol, a panel a layer.

    Each row has epochs [n] and by layer shares [n, N].
    """
    layers = len(next(iter(shown.values()))[1])
    figure, axes = panels(len(shown), layers, height=1.45, title=title, sharey=True)
    stacks = {
        row: {layer: (epochs, shares) for layer, shares in by_layer.items()}
        for row, (epochs, by_layer) in shown.items()
    }
    for ax, (epochs, shares) in _by_row_and_layer(axes, stacks, x="epoch", y="share of inputs"):
        _stack(ax, epochs, shares)
    return figure


def _stack(ax: Axes, x: np.ndarray, shares: np.ndarray) -> None:
    """Draw the shares [n, N] from expert 0 at the bottom up, with the experts' numbers at the right end."""
    count = shares.shape[1]
    colours = matplotlib.colormaps[SEQUENTIAL](np.linspace(0.08, 0.92, count))
    edges = np.vstack([np.zeros(len(x)), np.cumsum(shares, axis=1).T])
    for k, (below, above) in enumerate(pairwise(edges)):
        ax.fill_between(x, below, above, color=colours[k], linewidth=0)
        ax.plot(x, above, color="white", linewidth=0.8)
        if above[-1] - below[-1] >= NUMBERED:
            _number(ax, k, (1, (below[-1] + above[-1]) / 2), xycoords=("axes fraction", "data"))
    ax.set_xlim(x[0], x[-1] if x[-1] > x[0] else x[0] + 1)
    ax.set_ylim(0, 1)
    ax.locator_params(axis="x", nbins=4)
    ax.set_yticks([0, 0.5, 1])
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


@styled
def spectrum(shown: Mapping[str, np.ndarray], *, title: str, columns: int) -> Figure:
    """Draw the singular values of every M_i, largest first, a panel a matrix [N, n]; the identity has 1 throughout."""
    width = WIDTH * min(1.0, (columns + 0.8) / 3)
    figure, axes = tiles(len(shown), columns, height=1.9, title=title, width=width, sharey=True)
    room = 0.075 * max(float(np.ptp(np.concatenate([v.ravel() for v in shown.values()]))), 1e-9)
    for ax, (name, values) in zip(axes, shown.items(), strict=True):
        count, n = values.shape
        shares = np.linspace(0, 1, n) if n > 1 else np.array([0.5])
        colours = matplotlib.colormaps[SEQUENTIAL](np.linspace(0.05, 0.8, count))
        for k, y in enumerate(_apart(values[:, -1], room=room)):
            ax.plot(shares, values[k], color=colours[k], linestyle=DASHES[k % len(DASHES)], linewidth=1.1)
            _number(ax, k, (1, y), color=colours[k])
        ax.axhline(1, color="0.4", linewidth=0.8, linestyle=BASELINE_DASHES, zorder=1)
        ax.grid(axis="y")
        ax.locator_params(axis="y", nbins=5)
        ax.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
        ax.margins(x=0.02)
        ax.set_title(name)
    label_edges(axes, columns, x="share of the values", y="singular value of Mᵢ")
    return figure


def _number(ax: Axes, expert: int, place: tuple[float, float], **options: Any) -> None:
    """Write an expert's number to the right of a place."""
    options |= {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 6.5}
    ax.annotate(str(expert), place, **options)


def _apart(values: np.ndarray, *, room: float) -> np.ndarray:
    """Return places for labels near `values`, in their order and at least `room` apart."""
    order = np.argsort(values, kind="stable")
    placed = values[order].astype(float)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + room)
    placed -= (placed - values[order]).mean()
    places = np.empty_like(placed)
    places[order] = placed
    return places


def _by_row_and_layer(
    axes: np.ndarray, shown: Mapping[str, Mapping[str, T]], *, x: str, y: str, label_width: float = 1.3
) -> Iterator[tuple[Axes, T]]:
    """Yield the axes of each row and layer with its data; label the outer axes, and hide those without data."""
    layers = list(next(iter(shown.values())))
    for i, (row, by_layer) in enumerate(shown.items()):
        for j, layer in enumerate(layers):
            ax: Axes = axes[i, j]
            if layer not in by_layer:
                ax.set_axis_off()
                continue
            yield ax, by_layer[layer]
            if i == 0:
                ax.set_title(layer)
            if i == len(shown) - 1:
                ax.set_xlabel(x)
            if j == 0:
                ax.set_ylabel(f"{wrapped(row, label_width)}\n{y}" if len(shown) > 1 else y)
