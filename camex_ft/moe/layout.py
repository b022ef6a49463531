"""Where the tokens of a pass stand, which are real, what came before them in a cache; and tokens in groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from camex_ft.moe.routing import Routing
from camex_ft.moe.state import LayerState, RoutingState


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one pass stand among the real tokens of their rows; the same for all layers of a stack.

    Attributes:
        shape: B, L.
        mask: 1 for real tokens; [B, L]; None where all are.
        order: positions with the real tokens of a row first; [B, L]; None where they are.
        real: number of real tokens; [B]; None where all are.
        before: real tokens of each row that a cache stands for; empty without one.
        after: the same after this pass; empty where no state is kept.
        documents: packed documents, numbered within each row; [B, L]; None without packing.
    """

    shape: tuple[int, int]
    mask: Tensor | None = None
    order: Tensor | None = None
    real: Tensor | None = None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    documents: Tensor | None = None

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        mask: Tensor | None = None,
        *,
        state: RoutingState | None = None,
        keep: bool = False,
        documents: Tensor | None = None,
    ) -> Layout:
        """Return the layout of a pass over [B, L] tokens.

        Args:
            shape: B, L.
            mask: 1 for real tokens; [B, L]; None where all are.
            state: what the pass goes on from.
            keep: whether a later pass may go on from this one.
            documents: packed documents, numbered within each row; [B, L].
        """
        batch, length = shape
        before = () if state is None else state.counts
        real = None if mask is None else (mask != 0).sum(1)
        after: tuple[int, ...] = ()
        if keep:
            added = [length] * batch if real is None else real.tolist()
            if min(added) == length:
                mask = real = None
            after = tuple(c + n for c, n in zip(before or [0] * batch, added, strict=True))
        order = None if mask is None else (mask == 0).to(torch.int8).argsort(dim=1, stable=True)
        return cls(shape, mask, order, real, before, after, documents)

    def flags(self, device: torch.device) -> Tensor:
        """Return which positions are real; [B, L] bool."""
        if self.mask is None:
            return torch.ones(self.shape, dtype=torch.bool, device=device)
        return self.mask != 0

    def in_order(self, tokens: Tensor) -> Tensor:
        """Return [B, L, ...] with real tokens first."""
        return tokens if self.order is None else tokens.gather(1, like(self.order, tokens))

    def as_given(self, tokens: Tensor) -> Tensor:
        """Undo `in_order`."""
        return undo(tokens, self.order)


class Groups(NamedTuple):
    """Tokens in groups, each with its routing.

    Attributes:
        x: [G, L', in].
        weights: s; [G, N] or [G, L', N].
        routing: every routing that was computed, for the balance loss and the record; [B, N], [B, S, N] or [B, L, N];
            None where a cache goes on and none was.
        mask: which of those hold a token; as routing without N; None where all do.
        restore: [G, L', out] -> [B, L, out].
        state: what the layer remembers with a key-value cache, after these tokens.
        served: what the layer remembered before, where each row is one group that it serves.
    """

    x: Tensor
    weights: Tensor
    routing: Routing | None
    mask: Tensor | None
    restore: Callable[[Tensor], Tensor]
    state: LayerState | None = None
    served: LayerState | None = None


def like(index: Tensor, tokens: Tensor) -> Tensor:
    """Return an index [B, L] with the further dimensions of `tokens`."""
    return index if tokens.dim() == 2 else index.unsqueeze(-1).expand(-1, -1, tokens.shape[2])


def undo(tokens: Tensor, order: Tensor | None) -> Tensor:
    """Put [B, L, out] back where a gather by `order` took it from."""
    return tokens if order is None else torch.zeros_like(tokens).scatter(1, like(order, tokens), tokens)
