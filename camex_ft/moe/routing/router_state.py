"""Router state beside a key-value cache, so that generating token by token equals one full forward pass.

    of a row     the number of real tokens in the cache: segment and place of the next one follow from it
    of a layer   the routing weights that serve each segment, and the layer's inputs of the last two segments: the
                 running one is routed when it is full, and wrong tokens can be removed

A state belongs to one cache of one model. It follows the operations on the cache: rows reordered with beams, repeated
or selected, and tokens removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from camex_ft.moe.merging.caching import CachedExperts


@dataclass(frozen=True)
class LayerRouterState:
    """Router state of one layer. Rows of `tokens` end with their last real token; entries before a row's first are
    junk.

    Attributes:
        weights: entry j serves segment j of a row, for segments that have begun; [B, S, N].
        tokens: the layer's last inputs, in the first `length` columns of a buffer; [B, C, d]; None where the routing
            weights serve all later tokens.
        length: columns of `tokens` in use.
        segment: T.
        merged: cached merged experts that serve the rows now.
    """

    weights: Tensor
    tokens: Tensor | None = None
    length: int = 0
    segment: int = 0
    merged: CachedExperts | None = None

    def serving(self, counts: Sequence[int]) -> Tensor:
        """Return the routing weights of each row's next token, given its number of real tokens; [B, N]."""
        at = [count // self.segment if self.segment else 0 for count in counts]
        if len(set(at)) == 1:
            return self.weights[:, at[0]]
        return self.weights[torch.arange(len(at)), torch.tensor(at)]

    def recent(self, count: int) -> Tensor:
        """Return the last `count` columns of the inputs; [B, count, d]."""
        assert self.tokens is not None
        return self.tokens[:, self.length - count : self.length]

    def append(self, tokens: Tensor, real: Tensor | None) -> LayerRouterState:
        """Return the state with inputs added.

        Args:
            tokens: real ones first; [B, L, d].
            real: how many of each row are real; [B]; None: all.
        """
        if self.tokens is None:
            return self
        if real is not None:
            known = torch.cat([self.tokens[:, : self.length], tokens], dim=1)  # [B, H, d]
            width = min(2 * self.segment, known.shape[1])
            end = self.length + real.unsqueeze(1)  # [B, 1]
            columns = (torch.arange(width, device=known.device) + end - width).clamp_min(0)
            known = known.gather(1, columns.unsqueeze(-1).expand(-1, -1, known.shape[2]))
            return replace(self, tokens=known, length=width)
        added = tokens.shape[1]
        if self.length == 0:
            known = tokens[:, -2 * self.segment :]
            if known.shape[1] < added and not torch.is_grad_enabled():
                known = known.clone()  # a view would hold all of a long prompt
            return replace(self, tokens=known, length=known.shape[1])
        if torch.is_grad_enabled():
            known = torch.cat([self.tokens[:, : self.length], tokens], dim=1)[:, -2 * self.segment :]
            return replace(self, tokens=known, length=known.shape[1])
        buffer, length = self._with_room(added)
        buffer[:, length : length + added] = tokens
        return replace(self, tokens=buffer, length=length + added)

    def _with_room(self, added: int) -> tuple[Tensor, int]:
        """Return a buffer with room for more columns, which may be written to, and the columns in use."""
        buffer = self.tokens
        assert buffer is not None
        ours = not buffer.requires_grad and buffer.is_inference() <= torch.is_inference_mode_enabled()
        if ours and self.length + added <= buffer.shape[1]:
            return buffer, self.length
        length = min(self.length, 2 * self.segment)
        larger = buffer.new_empty(buffer.shape[0], length + added + self.segment, buffer.shape[2])
        larger[:, :length] = self.recent(length)
        return larger, length

    def route(self, rows: Sequence[int], at: Sequence[int], weights: Tensor) -> LayerRouterState:
        """Return the state with routing weights for one segment of each of some rows.

        Args:
            rows, at: the rows and their segments; [n] each.
            weights: [n, N].
        """
        missing = max(at) + 1 - self.weights.shape[1]
        table = torch.nn.functional.pad(self.weights, (0, 0, 0, max(0, missing)))
        table = table.clone() if missing <= 0 else table
        table[torch.tensor(rows), torch.tensor(at)] = weights.to(table.dtype)
        return replace(self, weights=table, merged=None if self.merged is None else self.merged.stale())

    def select(self, rows: Tensor) -> LayerRouterState:
        """Return the state of some rows, [n] indices, which may repeat."""
        tokens = None if self.tokens is None else self.tokens[:, : self.length].index_select(0, rows)
        merged = None if self.merged is None else self.merged.select(rows.tolist())
        return replace(self, weights=self.weights.index_select(0, rows), tokens=tokens, merged=merged)

    def crop(self, removed: Sequence[int], left: Sequence[int]) -> LayerRouterState:
        """Return the state with each row's last tokens removed.

        Args:
            removed, left: of each row, real tokens removed and left; [B] each.

        Raises:
            RuntimeError: the running segment begins before the stored inputs.
        """
        merged = None if self.merged is None else self.merged.stale()
        if self.tokens is None:
            return replace(self, merged=merged)
        length = self.length - max(removed)
        if any(count % self.segment > length for count in left):
            raise RuntimeError(
                f"cannot take back {max(removed)} tokens: routing remembers the last two segments of "
                f"{self.segment} tokens only. Compute the shorter prompt anew, or copy the cache before going on"
            )
        rows = [self.tokens[b, self.length - r - length : self.length - r] for b, r in enumerate(removed)]
        return replace(self, tokens=torch.stack(rows), length=length, merged=merged)

    def copy(self) -> LayerRouterState:
        """Return an independent copy of the state."""
        return self if self.tokens is None else replace(self, tokens=self.recent(self.length).clone())


@dataclass(eq=False)
class RouterState:
    """Router state of one model beside one key-value cache.

    Attributes:
        owner: the model's routing context.
        real: flags of the cache's positions that hold a token; [B, P] bool.
        counts: their number by row.
        layers: by layer name.
    """

    owner: object
    real: Tensor | None = None
    counts: tuple[int, ...] = ()
    layers: dict[str, LayerRouterState] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> RouterState:
        """Copy the state for a copied cache of the same model."""
        layers = {name: layer.copy() for name, layer in self.layers.items()}
        return RouterState(self.owner, self.real, self.counts, layers)

    def advance(self, real: Tensor, counts: tuple[int, ...], layers: dict[str, LayerRouterState]) -> None:
        """Take over the result of a forward pass: its real positions [B, L], the tokens of each row now, and layers."""
        self.real = real if self.real is None else torch.cat([self.real, real], dim=1)
        self.counts, self.layers = counts, layers

    def select(self, rows: Tensor) -> None:
        """Select rows, [n] indices, which may repeat, as for beams."""
        if self.real is not None:
            self.real = self.real[rows.to(self.real.device)]
        self.counts = tuple(self.counts[i] for i in rows.tolist())
        self.layers = {n: layer.select(rows.to(layer.weights.device)) for n, layer in self.layers.items()}

    def crop(self, positions: int) -> None:
        """Remove the last positions."""
        if positions and self.real is not None:
            end = self.real.shape[1] - positions
            removed = self.real[:, end:].sum(1).tolist()
            left = tuple(count - r for count, r in zip(self.counts, removed, strict=True))
            self.layers = {n: layer.crop(removed, left) for n, layer in self.layers.items()}
            self.real, self.counts = self.real[:, :end], left

    def reset(self) -> None:
        """Empty the state."""
        self.real, self.counts, self.layers = None, (), {}
