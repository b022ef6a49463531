"""Merged experts that are cached while tokens are generated one by one: made once a segment, used for all its tokens.

Rows with the same routing weights, such as beams of one prompt or prompts in their first segment, share one. Those that
differ lie one behind the other, [D, out, in], so that one batched product serves all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

Key = tuple[float, ...]
Map = tuple[Tensor, Tensor | None]
Make = Callable[
    [Tensor], dict[str, Map]
]  # s [n, N] -> name of a map -> (E_hat [n, out, in], b_hat [n, out] or None)


@dataclass(frozen=True)
class Kept:
    """Merged experts for D different rows of routing weights.

    Attributes:
        rows: which of the D serves each row; None where that is to be found out again.
        keys: the routing weights of each; [D].
        maps: name of a map -> (E_hat [D, out, in], b_hat [D, out] or None); empty where there are none.
        dtype: of the maps.
        moment: stands for the values of the parameters that they were made of (`ParameterCache.moment`).
    """

    rows: tuple[int, ...] | None
    keys: tuple[Key, ...]
    maps: Mapping[str, Map]
    dtype: torch.dtype
    moment: object = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Pickle nothing: cached experts do not outlive the scope in which parameters are declared unchanged."""
        return type(None), ()

    def stale(self) -> Kept:
        """Return the same for rows whose routing weights may have changed."""
        return replace(self, rows=None)

    def select(self, rows: Sequence[int]) -> Kept:
        """Return the same for some of the rows."""
        return self if self.rows is None else replace(self, rows=tuple(self.rows[i] for i in rows))

    def apply(self, name: str, x: Tensor) -> Tensor:
        """Return x E_hat^T + b_hat, each row with its own, in the maps' dtype; [B, L, in] -> [B, L, out]."""
        assert self.rows is not None
        weight, bias = self.maps[name]
        x = x.to(weight.dtype)
        count = len(self.keys)
        if count == 1:
            return F.linear(x, weight[0], None if bias is None else bias[0])
        order = sorted(range(len(self.rows)), key=self.rows.__getitem__)
        sizes = [self.rows.count(i) for i in range(count)]
        rows = x if order == list(range(len(order))) else x[order]
        if len(set(sizes)) == 1:
            y = _products(rows.reshape(count, -1, x.shape[2]), weight, bias).reshape(*x.shape[:2], -1)
        else:
            parts = zip(rows.split(sizes), range(count), strict=True)
            y = torch.cat([F.linear(part, weight[i], None if bias is None else bias[i]) for part, i in parts])
        return y if rows is x else y[torch.tensor(order).argsort().to(x.device)]


def _products(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x_i E_hat_i^T + b_hat_i; [D, m, in], [D, out, in], [D, out] -> [D, m, out]."""
    columns = x.transpose(1, 2)  # for few rows the weights are best read as they lie, see docs/cost.md
    y = torch.bmm(weight, columns) if bias is None else torch.baddbmm(bias.unsqueeze(2), weight, columns)
    return y.transpose(1, 2)


def keep(
    weights: Tensor,
    before: Kept | None,
    make: Make,
    *,
    most: int,
    dtype: torch.dtype,
    moment: object = None,
) -> Kept:
    """Return merged experts for rows with these routing weights.

    Args:
        weights: s; [B, N].
        before: what was kept until now, which is used again.
        make: merges experts.
        most: where more rows than these differ, none is made and `maps` is empty: the memory would grow with the batch.
        dtype: of the maps.
        moment: stands for the values of the parameters that `make` uses.
    """
    rows = [tuple(row) for row in weights.tolist()]
    keys = tuple(dict.fromkeys(rows))
    place = {key: i for i, key in enumerate(keys)}
    if len(keys) > most:
        return Kept(tuple(place[row] for row in rows), keys, {}, dtype, moment)
    usable = before is not None and before.maps and before.dtype == dtype and before.moment is moment
    known = [key for key in before.keys if key in place] if usable and before is not None else []
    new = [key for key in keys if key not in known]
    keys = (*known, *new)
    place = {key: i for i, key in enumerate(keys)}
    made = make(weights[[rows.index(key) for key in new]]) if new else {}
    if known and before is not None:
        chosen = torch.tensor([before.keys.index(key) for key in known], device=weights.device)
        made = {name: _stack(pair, made.get(name), chosen) for name, pair in before.maps.items()}
    return Kept(tuple(place[row] for row in rows), keys, made, dtype, moment)


def _stack(old: Map, new: Map | None, chosen: Tensor) -> Map:
    """Return some of the old ones with the new ones behind them."""
    if new is None and len(chosen) == len(old[0]) and chosen.tolist() == list(range(len(chosen))):
        return old
    weight, bias = old[0][chosen], None if old[1] is None else old[1][chosen]
    if new is None:
        return weight, bias
    return torch.cat([weight, new[0]]), None if bias is None or new[1] is None else torch.cat([bias, new[1]])
