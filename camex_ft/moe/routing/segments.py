"""Segments of causal stacks: groups of T tokens, each routed by the mean of the segment before it.

    real tokens of a row    t_0 ... t_{T-1} | t_T ... t_{2T-1} | ...
    served by                 the prior     |  mean of the     | ...
                                            |  first segment   |

The first segment is served by a learned prior, or ("self") by its own mean with stopped gradient, as in the paper.
Padding takes no place: a row's segments are counted over its real tokens, wherever padding lies. A forward pass may
begin in the middle of a segment, where a key-value cache holds the tokens before it: `LayerRouterState` then has the
values that routing needs. Packed documents are taken apart and count as rows of their own.
Source: CAMEx (arXiv 2502.18821, section 4 and its published code) for segments; prior, padding and caches are this
package's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from camex_ft.moe.routing.router import (
    NOISE_FLOOR,
    Grouping,
    Groups,
    Router,
    Routing,
    TokenPositions,
)
from camex_ft.moe.routing.router_state import LayerRouterState


def segments(
    x: Tensor,
    positions: TokenPositions,
    router: Router,
    grouping: Grouping,
    state: LayerRouterState | None = None,
) -> Groups:
    """Return hidden states [B, L, d] as groups of one segment each, routed by the segment before.

    Args:
        x: hidden states; [B, L, d].
        positions: of the tokens.
        router: of the layer.
        grouping: T, and the routing of the first segment.
        state: the layer's router state, where a key-value cache goes on.

    Raises:
        RuntimeError: the first segment routes itself, and the cache ends within it.
    """
    size = grouping.segment
    if state is None:
        if positions.documents is not None:
            return _packed(x, positions.documents, router, grouping)
        return _grid(x, positions, router, grouping, None)
    if grouping.first_segment == "self" and min(positions.before) < size:
        raise RuntimeError(
            "routing.first_segment: self lets the tokens of a first segment see its future, so that a key-value cache "
            f"that ends within it cannot go on: use prompts of at least {size} tokens, use_cache=False or prior"
        )
    if max(count % size for count in positions.before) + x.shape[1] <= size:
        return _within(x, positions, router, state)
    return _grid(x, positions, router, grouping, state)


def _within(x: Tensor, positions: TokenPositions, router: Router, state: LayerRouterState) -> Groups:
    """Group tokens that all lie in the running segment of their row: nothing has to be arranged."""
    size = state.segment
    weights = state.serving(positions.before)  # [B, N]
    after = state.append(_gather(x, positions.order), positions.real)
    counts = zip(positions.before, positions.after, strict=True)
    full = [b for b, (first, last) in enumerate(counts) if last > first and last % size == 0]
    if full:
        routing = router(after.recent(size)[full].mean(1))  # [n, N]
        after = after.route(full, [positions.after[b] // size for b in full], routing.weights)
    return Groups(x, weights, None, None, None, after, state)


def _grid(
    x: Tensor, positions: TokenPositions, router: Router, grouping: Grouping, state: LayerRouterState | None
) -> Groups:
    """Arrange rows in segments, [B, S, T, d]; the first one of a row begins with its tokens in the cache."""
    batch, length, width = x.shape
    size = grouping.segment
    begun = [count % size for count in positions.before]
    most = max(begun, default=0)
    if state is None:
        size = min(size, length)
    real = x.new_ones(batch, length, dtype=torch.bool) if positions.mask is None else positions.mask != 0
    tokens, real = _gather(x, positions.order), _gather(real, positions.order)
    turn = None
    if state is not None and most:
        tokens = torch.cat([state.recent(most), tokens], dim=1)
        junk = most - torch.tensor(begun, device=x.device).unsqueeze(1)  # [B, 1]
        columns = torch.arange(most + length, device=x.device)
        real = torch.cat([columns[:most] >= junk, real], dim=1)
        turn = (columns + junk) % (most + length)  # [B, most + L], junk goes last
        tokens, real = _gather(tokens, turn), real.gather(1, turn)
    count = -(-tokens.shape[1] // size)  # S, the last segment may be short
    padding = count * size - tokens.shape[1]
    tokens = F.pad(tokens, (0, 0, 0, padding)).view(batch, count, size, width)
    real = F.pad(real, (0, padding)).view(batch, count, size)  # [B, S, T]
    routing = router.route_mean(tokens, real)  # [B, S, N], each segment by its own mean
    counts, own = real.any(-1), routing.weights
    if state is not None:
        first = state.serving(positions.before).unsqueeze(1)  # [B, 1, N]
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
        return _scatter(_scatter(flat, turn)[:, most:], positions.order)

    after = _router_state(x, positions, served, state, grouping.segment) if positions.after else None
    groups, weights = tokens.flatten(0, 1), served[:, :-1].flatten(0, 1)
    return Groups(groups, weights, routing, counts, restore, after)


def _gather(tokens: Tensor, order: Tensor | None) -> Tensor:
    """Return [B, L, ...] with the tokens of each row in this order; [B, L], or None as they are."""
    if order is None:
        return tokens
    return tokens.gather(1, order if tokens.dim() == 2 else _like(order, tokens))


def _scatter(tokens: Tensor, order: Tensor | None) -> Tensor:
    """Undo `_gather` of [B, L, out]."""
    return tokens if order is None else torch.zeros_like(tokens).scatter(1, _like(order, tokens), tokens)


def _like(index: Tensor, tokens: Tensor) -> Tensor:
    """Return an index [B, L] with the last dimension of `tokens`."""
    return index.unsqueeze(-1).expand(-1, -1, tokens.shape[2])


def _router_state(
    x: Tensor, positions: TokenPositions, served: Tensor, state: LayerRouterState | None, size: int
) -> LayerRouterState:
    """Return the state after a forward pass whose local segments are `served` by these weights; [B, S + 1, N].

    The last entry counts only for rows whose last segment is full; elsewhere it is overwritten when it is.
    """
    if state is None:
        state = LayerRouterState(served, tokens=x[:, :0], segment=size)
    else:
        at = [count // size for count in positions.before]
        where = [(b, j + s, s) for b, j in enumerate(at) for s in range(1, served.shape[1])]
        rows, columns, local = (list(column) for column in zip(*where, strict=True))
        state = state.route(rows, columns, served[torch.tensor(rows), torch.tensor(local)])
    return state.append(_gather(x, positions.order), positions.real)


def _packed(x: Tensor, documents: Tensor, router: Router, grouping: Grouping) -> Groups:
    """Take packed documents apart: each is a row of its own, and groups without a token are left out."""
    batch, length, width = x.shape
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True).flatten()  # [B * L]
    row = starts.cumsum(0) - 1
    first = starts.nonzero().squeeze(1)
    place = torch.arange(batch * length, device=x.device) - first[row]
    longest = int(place.max()) + 1
    rows = x.new_zeros(len(first), longest, width).index_put((row, place), x.flatten(0, 1))
    mask = torch.zeros(len(first), longest, dtype=torch.bool, device=x.device)
    mask[row, place] = True
    groups = _grid(rows, TokenPositions((len(first), longest), mask), router, grouping, None)
    back = groups.restore
    assert groups.mask is not None and back is not None
    count = len(groups.x) // len(first)  # S
    used = groups.mask[:, -count:].flatten().nonzero().squeeze(1)

    def restore(y: Tensor) -> Tensor:
        whole = y.new_zeros(len(groups.x), *y.shape[1:]).index_copy(0, used, y)
        return back(whole)[row, place].view(batch, length, -1)

    return groups._replace(x=groups.x[used], weights=groups.weights[used], restore=restore)


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
