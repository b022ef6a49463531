"""Merged experts that are kept while tokens are generated one by one: made once a segment, used for each of its tokens.

Rows with the same routing weights, such as beams of one prompt or prompts in their first segment, share one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

Key = tuple[float, ...]
Map = tuple[Tensor, Tensor | None]
Make = Callable[[Tensor], dict[str, Map]]  # routing weights [1, N] -> name of a map -> (E_hat, b_hat)


@dataclass(frozen=True)
class Kept:
    """Merged experts by routing weights.

    Attributes:
        rows: the routing weights that serve each row; None where that is to be found out again.
        maps: routing weights -> name of a map -> (E_hat [out, in], b_hat [out] or None).
        dtype: of the maps.
    """

    rows: tuple[Key, ...] | None
    maps: dict[Key, dict[str, Map]]
    dtype: torch.dtype

    def stale(self) -> Kept:
        """Return the same for rows whose routing weights may have changed."""
        return replace(self, rows=None)

    def select(self, rows: Sequence[int]) -> Kept:
        """Return the same for some of the rows."""
        return self if self.rows is None else replace(self, rows=tuple(self.rows[i] for i in rows))

    def apply(self, name: str, x: Tensor) -> Tensor:
        """Return x E_hat^T + b_hat, each row with its own; [B, L, in] -> [B, L, out]."""
        assert self.rows is not None
        if len(self.maps) == 1:
            return F.linear(x, *self.maps[self.rows[0]][name])
        if len(self.maps) == len(self.rows):
            return torch.cat(
                [F.linear(x[i : i + 1], *self.maps[key][name]) for i, key in enumerate(self.rows)]
            )
        parts, order = [], []
        for key, maps in self.maps.items():
            rows = [i for i, own in enumerate(self.rows) if own == key]
            parts.append(F.linear(x[rows], *maps[name]))
            order += rows
        return torch.cat(parts)[torch.tensor(order).argsort().to(x.device)]


def keep(weights: Tensor, before: Kept | None, make: Make, *, most: int, dtype: torch.dtype) -> Kept:
    """Return merged experts for rows with these routing weights.

    Args:
        weights: s; [B, N].
        before: what was kept until now, which is used again.
        make: merges experts.
        most: where more rows than these differ, none is made and `maps` is empty: the memory would grow with the batch.
        dtype: of the maps.
    """
    rows = tuple(map(tuple, weights.tolist()))
    known = before.maps if before is not None and before.dtype == dtype else {}
    made: dict[Key, dict[str, Map]] = {}
    if len(set(rows)) <= most:
        for i, key in enumerate(rows):
            if key not in made:
                made[key] = known.get(key) or make(weights[i : i + 1])
    return Kept(rows, made, dtype)
