"""Granularity: which tokens share routing weights, and what they are routed by.

    sequence   one group a sequence, routed by the mean of its own tokens; sees the whole sequence
    segment    one group for T tokens, routed by the mean of the segment before: strictly causal. The first segment is
               served by a learned prior, or ("self") by its own mean with stopped gradient, as in the paper
    token      one group a token, routed by itself: causal
    encoder    for decoder layers: one group a sequence, routed by the encoder's pooled output: causal, knows the input

Groups come back as [G, L', in] with routing weights [G, N], or [G, L', N] for tokens. Padding never counts: not in a
mean, not in where segments begin, not in the balance loss.

Segments, of T tokens of a causal stack:

    real tokens of a row    t_0 ... t_{T-1} | t_T ... t_{2T-1} | ...
    served by                 the prior     |  mean of the     | ...
                                            |  first segment   |

Padding takes no place: a row's segments are counted over its real tokens, wherever padding lies. A pass may begin in
the middle of a segment, where a key-value cache holds the tokens before it: `LayerState` then has what routing needs.
Packed documents are taken apart and count as rows of their own.
Source: CAMEx (arXiv 2502.18821, section 4 and its published code) for sequence and segment; prior, padding and caches
are this package's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from camex_ft.moe.routing.cache import LayerState, RoutingState
from camex_ft.moe.routing.router import NOISE_FLOOR, Router, Routing, masked_mean

Granularity = Literal["sequence", "segment", "token", "encoder"]
FirstSegment = Literal["prior", "self"]


@dataclass(frozen=True)
class Grouping:
    """Grouping of tokens: granularity, segment length T in tokens, and what serves the first segment."""

    granularity: Granularity = "sequence"
    segment: int = 256
    first_segment: FirstSegment = "prior"

    @property
    def needs_prior(self) -> bool:
        """Return whether the router must learn a prior."""
        return self.granularity == "segment" and self.first_segment == "prior"


@dataclass(frozen=True)
class Layout:
    """Places of the tokens of one pass among the real tokens of their rows; the same for all layers of a stack.

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


class Flow(NamedTuple):
    """Places of one layer's tokens among those that went before.

    Attributes:
        layout: of the pass.
        state: what the layer remembers, where a key-value cache goes on.
        keep: whether a later pass may go on from this one.
        encoded: the encoder's pooled output, for granularity "encoder"; [B, in].
    """

    layout: Layout
    state: LayerState | None = None
    keep: bool = False
    encoded: Tensor | None = None


def group(x: Tensor, flow: Flow, router: Router, grouping: Grouping) -> Groups:
    """Group and route hidden states.

    Args:
        x: hidden states; [B, L, in].
        flow: where they stand.
        router: of the layer.
        grouping: how.

    Raises:
        RuntimeError: routing by the encoder without its output, or a cache that cannot go on (`segments`).
    """
    if grouping.granularity == "segment":
        return segments(x, flow.layout, router, grouping, flow.state, keep=flow.keep)
    if grouping.granularity == "encoder":
        return _by_encoder(x, flow, router)
    if grouping.granularity == "token":
        routing = router(x, flow.layout.mask)  # [B, L, N]
        return Groups(x, routing.weights, routing, flow.layout.mask, lambda y: y)
    routing = router(masked_mean(x, flow.layout.mask))  # [B, N]
    return Groups(x, routing.weights, routing, None, lambda y: y)


def _by_encoder(x: Tensor, flow: Flow, router: Router) -> Groups:
    if flow.state is not None:
        return Groups(x, flow.state.weights[:, 0], None, None, lambda y: y, flow.state, flow.state)
    if flow.encoded is None:
        raise RuntimeError("routing by the encoder: this forward pass has no encoder output")
    routing = router(flow.encoded)  # [B, N]
    state = LayerState(routing.weights.unsqueeze(1)) if flow.keep else None
    return Groups(x, routing.weights, routing, None, lambda y: y, state)


def segments(
    x: Tensor, layout: Layout, router: Router, grouping: Grouping, state: LayerState | None, *, keep: bool
) -> Groups:
    """Return hidden states [B, L, d] as groups of one segment each, routed by the segment before.

    Args:
        x: hidden states; [B, L, d].
        layout: of the pass.
        router: of the layer.
        grouping: T, and what serves the first segment.
        state: what the layer remembers, where a cache goes on.
        keep: whether to make the state to go on from.

    Raises:
        RuntimeError: the first segment routes itself, and the cache ends within it.
    """
    size = grouping.segment
    if state is None:
        if layout.documents is not None:
            return _packed(x, layout.documents, router, grouping)
        return _grid(x, layout, router, grouping, None, keep=keep)
    if grouping.first_segment == "self" and min(layout.before) < size:
        raise RuntimeError(
            "routing.first_segment: self lets the tokens of a first segment see its future, so that a key-value cache "
            f"that ends within it cannot go on: use prompts of at least {size} tokens, use_cache=False or prior"
        )
    if max(count % size for count in layout.before) + x.shape[1] <= size:
        return _within(x, layout, router, state)
    return _grid(x, layout, router, grouping, state, keep=keep)


def _within(x: Tensor, layout: Layout, router: Router, state: LayerState) -> Groups:
    """Every row's tokens lie in the segment that runs: nothing has to be arranged."""
    size = state.segment
    weights = state.serving(layout.before)  # [B, N]
    after = state.append(layout.in_order(x), layout.real)
    counts = zip(layout.before, layout.after, strict=True)
    full = [b for b, (first, last) in enumerate(counts) if last > first and last % size == 0]
    if full:
        routing = router(after.recent(size)[full].mean(1))  # [n, N]
        after = after.route(full, [layout.after[b] // size for b in full], routing.weights)
    return Groups(x, weights, None, None, lambda y: y, after, state)


def _grid(
    x: Tensor, layout: Layout, router: Router, grouping: Grouping, state: LayerState | None, *, keep: bool
) -> Groups:
    """Arrange rows in segments, [B, S, T, d]; the first one of a row begins with what a cache holds of it."""
    batch, length, width = x.shape
    size = grouping.segment
    begun = [count % size for count in layout.before]
    most = max(begun, default=0)
    if state is None:
        size = min(size, length)
    tokens, real = layout.in_order(x), layout.in_order(layout.flags(x.device))
    turn = None
    if state is not None and most:
        tokens = torch.cat([state.recent(most), tokens], dim=1)
        junk = most - torch.tensor(begun, device=x.device).unsqueeze(1)  # [B, 1]
        columns = torch.arange(most + length, device=x.device)
        real = torch.cat([columns[:most] >= junk, real], dim=1)
        turn = (columns + junk) % (most + length)  # [B, most + L], junk goes last
        tokens, real = tokens.gather(1, like(turn, tokens)), real.gather(1, turn)
    count = -(-tokens.shape[1] // size)  # S, the last segment may be short
    padding = count * size - tokens.shape[1]
    tokens = F.pad(tokens, (0, 0, 0, padding)).view(batch, count, size, width)
    real = F.pad(real, (0, padding)).view(batch, count, size)  # [B, S, T]
    routing = router(masked_mean(tokens, real))  # [B, S, N], each segment by its own mean
    counts, own = real.any(-1), routing.weights
    if state is not None:
        first = state.serving(layout.before).unsqueeze(1)  # [B, 1, N]
    elif grouping.first_segment == "prior":
        prior = router.route_prior(batch)
        first = prior.weights.unsqueeze(1)
        routing = _prepend(prior, routing)
        counts = torch.cat([torch.ones_like(counts[:, :1]), counts], dim=1)
    else:
        first = own[:, :1].detach()
    served = torch.cat([first.to(own.dtype), own], dim=1)  # segment j is served by segment j - 1

    def restore(y: Tensor) -> Tensor:
        flat = y.view(batch, count * size, -1)[:, : most + length]  # [B, most + L, out]
        return layout.as_given(undo(flat, turn)[:, most:])

    made = _remember(x, layout, served, state, grouping.segment) if keep else None
    groups, weights = tokens.flatten(0, 1), served[:, :-1].flatten(0, 1)
    return Groups(groups, weights, routing, counts, restore, made)


def _remember(x: Tensor, layout: Layout, served: Tensor, state: LayerState | None, size: int) -> LayerState:
    """Return the state after a pass whose local segments were, and will be, `served` by these weights [B, S + 1, N].

    The last entry counts only for rows whose last segment is full; elsewhere it is written anew when it is.
    """
    if state is None:
        state = LayerState(served, tokens=x[:, :0], segment=size)
    else:
        at = [count // size for count in layout.before]
        where = [(b, j + s, s) for b, j in enumerate(at) for s in range(1, served.shape[1])]
        rows, columns, local = (list(each) for each in zip(*where, strict=True))
        state = state.route(rows, columns, served[torch.tensor(rows), torch.tensor(local)])
    return state.append(layout.in_order(x), layout.real)


def _packed(x: Tensor, documents: Tensor, router: Router, grouping: Grouping) -> Groups:
    """Take packed documents apart: each is a row of its own, and groups without a token are left out."""
    batch, length, width = x.shape
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True).flatten()  # [B * L]
    row = starts.cumsum(0) - 1
    first = starts.nonzero().squeeze(1)
    place = torch.arange(batch * length, device=x.device) - first[row]
    longest = int(place.max()) + 1
    apart = x.new_zeros(len(first), longest, width).index_put((row, place), x.flatten(0, 1))
    mask = torch.zeros(len(first), longest, dtype=torch.bool, device=x.device)
    mask[row, place] = True
    made = _grid(apart, Layout.of((len(first), longest), mask), router, grouping, None, keep=False)
    assert made.mask is not None
    each = len(made.x) // len(first)  # S
    used = made.mask[:, -each:].flatten().nonzero().squeeze(1)

    def restore(y: Tensor) -> Tensor:
        whole = y.new_zeros(len(made.x), *y.shape[1:]).index_copy(0, used, y)
        return made.restore(whole)[row, place].view(batch, length, -1)

    return made._replace(x=made.x[used], weights=made.weights[used], restore=restore)


def _prepend(prior: Routing, routing: Routing) -> Routing:
    """Put the prior's routing [B, N] before that of the segments [B, S, N]; it is drawn without noise."""
    first = Routing(prior.weights.unsqueeze(1), prior.logits.unsqueeze(1))
    noisy = scale = None
    if routing.noisy is not None and routing.scale is not None:
        noisy = torch.cat([first.logits, routing.noisy], dim=1)
        scale = torch.cat([torch.full_like(first.logits, NOISE_FLOOR), routing.scale], dim=1)
    return Routing(
        torch.cat([first.weights.to(routing.weights.dtype), routing.weights], dim=1),
        torch.cat([first.logits.to(routing.logits.dtype), routing.logits], dim=1),
        noisy,
        scale,
    )
