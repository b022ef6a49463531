"""Rows that a model got right, one bit a row, as text that a record can hold, for McNemar's test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack(correct: Sequence[bool] | np.ndarray) -> str:
    """Return ``<rows>:<hexadecimal digits>`` of one bit a row, 1 = right, the first row in the highest bit.

    Args:
        correct: [rows], bool.
    """
    bits = np.asarray(correct, dtype=bool)
    return f"{len(bits)}:{np.packbits(bits).tobytes().hex()}"


def unpack(text: str) -> np.ndarray:
    """Return what `pack` was given; [rows], bool. `ValueError` for other text."""
    rows, _, digits = text.partition(":")
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8))
    if not 0 <= len(bits) - int(rows) < 8:
        raise ValueError(f"{len(bits)} bits for {rows} rows")
    return bits[: int(rows)].astype(bool)
