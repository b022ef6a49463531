"""Style of pictures: figures, axes, and the colour, line and marker of each row."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

TITLE = 12  # characters of a title in an inch
LETTERS = 14  # of another label
STEPS = [1, 2, 2.5, 5, 10]  # between ticks
WIDTH = 7.2  # inches of a picture: a page's text width
SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with Matplotlib, so that a picture is the same everywhere
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.35",
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "0.25",
    "ytick.color": "0.25",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "grid.color": "0.88",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.titlesize": 10,
    "figure.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.06,
    "savefig.facecolor": "white",
    "text.parse_math": False,  # a label with two dollar signs is no formula
}
# Okabe and Ito, "Color Universal Design" (2008), without the yellow, which is hard to see on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))
SEQUENTIAL = (
    "cividis"  # perceptually uniform, made for the colour-blind, and its lightness grows with the value
)
BASELINE = "0.15"

P = ParamSpec("P")


@dataclass(frozen=True, kw_only=True)
class Look:
    """Colour, line and marker of one row, the same in every panel of a picture."""

    colour: str
    marker: str
    line: Any


def looks(labels: Sequence[str], *, baseline: str | None = None) -> dict[str, Look]:
    """Return a look for each label; no two labels of the first 42 share colour, line and marker."""
    made = {}
    others = [label for label in dict.fromkeys(labels) if label != baseline]
    for i, label in enumerate(others):
        made[label] = Look(
            colour=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], line=LINES[i % len(LINES)]
        )
    if baseline in labels and baseline is not None:
        made[baseline] = Look(colour=BASELINE, marker="x", line=(0, (2, 1.2)))
    return made


def drawn(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw with the settings of this module, whatever the process has set; they are what it had afterwards."""

    @wraps(function)
    def with_style(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS, "backend": "agg"}):
            return function(*args, **kwargs)

    return with_style


def panels(
    rows: int,
    columns: int,
    *,
    height: float,
    title: str,
    width: float = WIDTH,
    sharex: bool | str = False,
    sharey: bool | str = False,
) -> tuple[Figure, np.ndarray]:
    """Return a figure of rows x columns axes, each `height` inches high, and the axes as an array [rows, columns]."""
    figure = Figure(figsize=(width, height * rows + 0.45), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(textwrap.fill(title, int(TITLE * width)), x=0.01, ha="left")
    return figure, figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)  # type: ignore[arg-type]


def wrapped(text: str, inches: float) -> str:
    """Return a label in as many lines as it needs in this width."""
    return textwrap.fill(text, max(8, int(LETTERS * inches)), break_long_words=False)


def hide_rest(axes: np.ndarray, used: int) -> None:
    """Remove the axes of a grid after the first `used`."""
    for ax in axes.flat[used:]:
        ax.remove()


def legend_below(figure: Figure, lines: Sequence[Line2D], *, columns: int = 4) -> None:
    """Put a legend of labelled lines under the axes."""
    if lines:
        # labels are given beside the lines, or Matplotlib hides those that begin with an underscore
        names = [str(line.get_label()) for line in lines]
        figure.legend(lines, names, loc="outside lower left", ncols=min(columns, len(lines)))


def columns_for(count: int, *, most: int = 3) -> int:
    """Return how many columns, at most `most`, a grid of `count` panels gets: the fewest places are left empty."""
    if count <= most:
        return 2 if count == 4 else max(1, count)
    return min(range(most, 1, -1), key=lambda columns: (-count % columns, -columns))
