"""Pictures as PNG files that know what they were drawn from."""

from __future__ import annotations

import hashlib
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from camex_ft.results.record import all_finite
from camex_ft.utils.durable import write_atomically

KEY = "camex_ft digest"
DPI = 150


def png(figure: Figure, *, source: Any = None) -> bytes:
    """Return the figure as a PNG, with the digest of its source in a text chunk."""
    buffer = io.BytesIO()
    # the default names the version of Matplotlib: bytes that differ for nothing
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None, KEY: digest(source)})
    return buffer.getvalue()


def save(figure: Figure, path: Path | str, *, source: Any) -> Path:
    """Write the figure to `path` as a PNG, with a digest of its data and of the code that drew it; return the path.

    Args:
        figure: what to write.
        path: of the file; its folder is made.
        source: the data: anything that JSON can hold, and NumPy arrays. `is_stale` compares it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png(figure, source=source))
    return path


def is_stale(path: Path | str, source: Any) -> bool:
    """Return whether the picture at `path` is missing, or was drawn from other data or by other code."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()  # text chunks may follow the pixels
            return getattr(image, "text", {}).get(KEY) != digest(source)
    except (FileNotFoundError, OSError):
        return True


def digest(source: Any) -> str:
    """Return SHA-256 over the source as JSON and over this package's files."""
    text = json.dumps(all_finite(source), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256((code() + text).encode()).hexdigest()


@cache
def code() -> str:
    """Return a digest of the drawing code: every file of this package."""
    made = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        made.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return made.hexdigest()
