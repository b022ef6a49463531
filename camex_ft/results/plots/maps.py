"""Heat maps: routing, distance of the curvature from the identity, cosine similarity of domain vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from camex_ft.results.plots.style import SEQUENTIAL, WIDTH, columns_for, drawn, hide_rest, panels, wrapped

LETTER = 0.085  # inches of a tick's letter
NUMBER = 0.27  # inches of a number in a cell
FINE = 0.2  # range below which numbers have three places


@drawn
def routing(
    weights: Mapping[str, Mapping[str, np.ndarray]], groups: Sequence[str], *, title: str, x_label: str
) -> Figure:
    """Draw the mean routing weight of each group of inputs: a row of panels a protocol, a panel a layer.

    Args:
        weights: by row and layer; [groups, N].
        groups: their names: domains or labels.
        title, x_label: of the picture; what groups are.
    """
    rows, layers = list(weights), list(next(iter(weights.values())))
    experts = max(w.shape[1] for some in weights.values() for w in some.values())
    cell = (WIDTH - 1.4) / (len(layers) * len(groups))  # inches
    longest = max(map(len, groups))
    turned = longest * LETTER > cell
    height = 0.2 + 0.19 * max(experts, 4)
    figure, axes = panels(len(rows), len(layers), height=height, title=title, sharex=True, sharey="row")
    figure.set_figheight(figure.get_figheight() + 0.5 + (LETTER * longest if turned else 0.1))
    top = max(float(np.nanmax(w)) for some in weights.values() for w in some.values())
    image: AxesImage | None = None
    for i, row in enumerate(rows):
        for j, layer in enumerate(layers):
            ax: Axes = axes[i, j]
            if layer not in weights[row]:
                ax.set_axis_off()
                continue
            image = _image(ax, weights[row][layer].T, low=0.0, high=top)
            ax.set_xticks(range(len(groups)), groups, rotation=90 if turned else 0)
            ax.set_yticks(range(weights[row][layer].shape[1]))
            if cell >= NUMBER:
                _numbers(ax, weights[row][layer].T, low=0.0, high=top)
            if i == 0:
                ax.set_title(layer)
            if i == len(rows) - 1:
                ax.set_xlabel(x_label)
            if j == 0:
                ax.set_ylabel(f"{wrapped(row, height)}\nexpert" if len(rows) > 1 else "expert")
    if image is not None:
        _bar(figure, image, axes, "mean routing weight")
    return figure


@drawn
def distances(shown: Mapping[str, tuple[Sequence[str], np.ndarray]], *, title: str) -> Figure:
    """Draw ||M_i - I||_F / ||I||_F: layers x experts, a panel a row, all on one scale.

    Args:
        shown: by row, names of layers and distances [layers, N].
        title: of the picture.
    """
    rows = list(shown)
    columns = columns_for(len(rows))
    most = max(len(names) for names, _ in shown.values())
    height = 0.4 + 0.2 * most
    figure, axes = panels(
        -(-len(rows) // columns),
        columns,
        height=height,
        title=title,
        width=WIDTH if len(rows) > 1 else 0.75 * WIDTH,
    )
    figure.set_figheight(figure.get_figheight() + 0.75)
    top = max(float(np.nanmax(d)) for _, d in shown.values()) or 1.0
    image: AxesImage | None = None
    for k, (ax, row) in enumerate(zip(axes.flat, rows, strict=False)):
        names, values = shown[row]
        image = _image(ax, values, low=0.0, high=top)
        ax.set_xticks(range(values.shape[1]))
        ax.set_yticks(range(len(names)), names if k % columns == 0 or names != shown[rows[k - 1]][0] else [])
        ax.set_title(wrapped(row, (WIDTH - 1) / columns) if len(rows) > 1 else "")
        if k + columns >= len(rows):
            ax.set_xlabel("expert")
        if 0.7 * WIDTH / (columns * values.shape[1]) >= NUMBER * (1 if top >= FINE else 1.3):
            _numbers(ax, values, low=0.0, high=top)
    hide_rest(axes, len(rows))
    if image is not None:
        _bar(figure, image, axes.flat[: len(rows)], "‖Mᵢ − I‖ / ‖I‖")
    return figure


@drawn
def similarity(matrices: Mapping[str, np.ndarray], *, title: str) -> Figure:
    """Draw the cosine similarity of domain vectors, a panel a layer, from -1 to 1.

    Args:
        matrices: by layer; [N, N].
        title: of the picture.
    """
    columns = min(4, len(matrices))
    width = WIDTH if columns > 2 else 0.8 * WIDTH
    side = min(2.4, (width - 0.6) / columns - 0.25)
    rows = -(-len(matrices) // columns)
    figure, axes = panels(rows, columns, height=side + 0.4, title=title, width=width)
    figure.set_figheight(figure.get_figheight() + 0.5)
    image: AxesImage | None = None
    for k, (ax, (layer, matrix)) in enumerate(zip(axes.flat, matrices.items(), strict=False)):
        image = _image(ax, matrix, low=-1.0, high=1.0, equal=True)
        ax.set_xticks(range(len(matrix)))
        ax.set_yticks(range(len(matrix)))
        ax.set_title(layer)
        if k + columns >= len(matrices):
            ax.set_xlabel("expert")
        if k % columns == 0:
            ax.set_ylabel("expert")
        if side / len(matrix) >= NUMBER:
            _numbers(ax, matrix, low=-1.0, high=1.0)
    hide_rest(axes, len(matrices))
    if image is not None:
        _bar(figure, image, axes.flat[: len(matrices)], "cosine similarity")
    return figure


def _bar(figure: Figure, image: AxesImage, axes: np.ndarray, label: str) -> None:
    pad = 0.1 / figure.get_figheight()
    figure.colorbar(
        image, ax=list(axes.flat), label=label, location="bottom", shrink=0.45, aspect=28, pad=pad
    )


def _image(ax: Axes, values: np.ndarray, *, low: float, high: float, equal: bool = False) -> AxesImage:
    made = ax.imshow(
        values,
        cmap=SEQUENTIAL,
        vmin=low,
        vmax=high,
        aspect="equal" if equal else "auto",
        interpolation="nearest",
    )
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    # thin white lines, so that cells of nearly one colour are still counted
    ax.set_xticks(np.arange(values.shape[1] - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(values.shape[0] - 1) + 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=0.6)
    ax.tick_params(which="minor", length=0)
    return made


def _numbers(ax: Axes, values: np.ndarray, *, low: float, high: float) -> None:
    places = 2 if high - low >= FINE else 3
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = (value - low) / max(high - low, 1e-12) < 0.55
            ax.text(
                j, i, f"{value:.{places}f}".replace("-", "−"), ha="center", va="center", fontsize=6.5,
                color="white" if dark else "black",
            )  # fmt: skip
