"""Figures: style, grids of panels, the look of each row, and PNG files that record their source."""

from __future__ import annotations

import hashlib
import io
import json
import textwrap
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from camex_ft.results.record import all_finite
from camex_ft.utils.durable import write_atomically

WIDTH = 7.2  # inches of a picture: a page's text width
DPI = 150
KEY = "camex_ft digest"  # of the PNG text chunk
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
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))
SEQUENTIAL = "cividis"  # perceptually uniform, safe for the colour-blind, lighter for larger values
BASELINE = "0.15"  # colour
BASELINE_DASHES = (0, (2, 1.2))

P = ParamSpec("P")


# -- style ------------------------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """Colour, marker and dashes of one row, the same in every panel of a picture."""

    colour: str
    marker: str
    dashes: Any


def looks(labels: Sequence[str], *, baseline: str | None = None) -> dict[str, Look]:
    """Return a look for each label; the first 42 differ in colour, marker or dashes."""
    cycle = (Look(*(signs[i % len(signs)] for signs in (COLOURS, MARKERS, DASHES))) for i in count())
    rows = (label for label in dict.fromkeys(labels) if label != baseline)
    by_label = dict(zip(rows, cycle, strict=False))
    if baseline is not None and baseline in labels:
        by_label[baseline] = Look(BASELINE, "x", BASELINE_DASHES)
    return by_label


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw with `SETTINGS` alone; Matplotlib's settings in the process neither matter nor change."""

    @wraps(draw)
    def with_style(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS, "backend": "agg"}):
            return draw(*args, **kwargs)

    return with_style


def wrapped(text: str, inches: float) -> str:
    """Return a label broken into lines that fit this width."""
    return textwrap.fill(text, max(8, int(14 * inches)), break_long_words=False)


# -- panels -----------------------------------------------------------------------------------------------------------


def panels(
    rows: int,
    columns: int,
    *,
    height: float,
    title: str,
    width: float = WIDTH,
    sharex: Any = False,
    sharey: Any = False,
) -> tuple[Figure, np.ndarray]:
    """Return a figure of rows x columns axes, each `height` inches high, and the axes as an array [rows, columns]."""
    figure = Figure(figsize=(width, height * rows + 0.45), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(textwrap.fill(title, int(12 * width)), x=0.01, ha="left")
    return figure, figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)


def tiles(count: int, columns: int, **options: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure of `count` axes in so many columns, and the axes; `options` are those of `panels`."""
    figure, grid = panels(-(-count // columns), columns, **options)
    for ax in grid.flat[count:]:
        ax.remove()
    return figure, list(grid.flat[:count])


def label_edges(axes: Sequence[Axes], columns: int, *, x: str, y: str = "") -> None:
    """Label the axes of `tiles`: x where no panel is below, y in the first column."""
    for i, ax in enumerate(axes):
        if i + columns >= len(axes):
            ax.set_xlabel(x)
            ax.tick_params(labelbottom=True)
        if i % columns == 0 and y:
            ax.set_ylabel(y)


def columns_for(count: int, *, most: int = 3) -> int:
    """Return the number of columns, at most `most`, that leaves the fewest places of a grid empty."""
    if count <= most:
        return 2 if count == 4 else max(1, count)
    return min(range(most, 1, -1), key=lambda columns: (-count % columns, -columns))


def legend_below(figure: Figure, lines: Sequence[Line2D]) -> None:
    """Put a legend of labelled lines under the axes."""
    if lines:  # with names, as Matplotlib hides labels that begin with an underscore
        names = [str(line.get_label()) for line in lines]
        figure.legend(lines, names, loc="outside lower left", ncols=min(4, len(lines)))


# -- files ------------------------------------------------------------------------------------------------------------


def png(figure: Figure, *, source: Any = None) -> bytes:
    """Return the figure as a PNG, with the digest of its source in a text chunk."""
    buffer = io.BytesIO()
    # without the version of Matplotlib: the same picture has the same bytes
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None, KEY: digest(source)})
    return buffer.getvalue()


def save(figure: Figure, path: Path | str, *, source: Any) -> Path:
    """Write the figure to `path` as a PNG, with a digest of its data for `is_stale`; return the path.

    The source is any JSON value, or NumPy arrays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png(figure, source=source))
    return path


def is_stale(path: Path | str, source: Any) -> bool:
    """Return whether the picture at `path` is missing, or was drawn from other data."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()  # text chunks may follow the pixels
            return getattr(image, "text", {}).get(KEY) != digest(source)
    except OSError:
        return True


def digest(source: Any) -> str:
    """Return the SHA-256 of the source as JSON."""
    text = json.dumps(all_finite(source), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
