"""Granularity: which tokens share routing weights, and what they are routed by.

    sequence   one group a sequence, routed by the mean of its own tokens; sees the whole sequence
    segment    one group for T tokens, routed by the mean of the segment before: strictly causal. The first segment is
               served by a learned prior, or ("self") by its own mean with stopped gradient, as in the paper
    token      one group a token, routed by itself: causal
    encoder    for decoder layers: one group a sequence, routed by the encoder's pooled output: causal, knows the input

Groups come back as [G, L', in] with routing weights [G, N], or [G, L', N] for tokens. Padding never counts: not in a
mean, not in where segments begin, not in the balance loss.
Source: CAMEx (arXiv 2502.18821, section 4 and its published code) for sequence and segment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from camex_ft.moe.routing import NOISE_FLOOR, Router, Routing, masked_mean

Granularity = Literal["sequence", "segment", "token", "encoder"]
FirstSegment = Literal["prior", "self"]


@dataclass(frozen=True)
class Grouping:
    """How tokens are grouped: granularity, segment length T in tokens, and what serves the first segment."""

    granularity: Granularity = "sequence"
    segment: int = 256
    first_segment: FirstSegment = "prior"

    @property
    def needs_prior(self) -> bool:
        """Whether the router must learn a prior."""
        return self.granularity == "segment" and self.first_segment == "prior"


class Groups(NamedTuple):
    """Tokens in groups, each with its routing.

    Attributes:
        x: [G, L', in].
        weights: s; [G, N] or [G, L', N].
        routing: every routing that was computed, for the balance loss and the record; [B, N], [B, S, N] or [B, L, N].
        mask: which of those hold a token; as routing without N; None where all do.
        restore: [G, L', out] -> [B, L, out].
    """

    x: Tensor
    weights: Tensor
    routing: Routing
    mask: Tensor | None
    restore: Callable[[Tensor], Tensor]


def group(
    x: Tensor, mask: Tensor | None, router: Router, grouping: Grouping, encoded: Tensor | None = None
) -> Groups:
    """Group and route hidden states.

    Args:
        x: hidden states; [B, L, in].
        mask: 1 for tokens that count; [B, L]; None counts all.
        router: of the layer.
        grouping: how.
        encoded: the encoder's pooled output, for granularity "encoder"; [B, in].
    """
    if grouping.granularity == "segment":
        return _segments(x, mask, router, grouping)
    if grouping.granularity == "token":
        routing = router(x)  # [B, L, N]
        return Groups(x, routing.weights, routing, mask, lambda y: y)
    if grouping.granularity == "encoder":
        if encoded is None:
            raise RuntimeError("routing by the encoder: this forward pass has no encoder output")
        routing = router(encoded)  # [B, N]
    else:
        routing = router(masked_mean(x, mask))  # [B, N]
    return Groups(x, routing.weights, routing, None, lambda y: y)


def _segments(x: Tensor, mask: Tensor | None, router: Router, grouping: Grouping) -> Groups:
    batch, length, width = x.shape
    span = min(grouping.segment, length)
    count = -(-length // span)  # S, the last segment may be short
    if mask is None:
        mask = x.new_ones(batch, length, dtype=torch.bool)
    order = _from_first_token(mask)  # [B, L]
    padding = count * span - length
    tokens = F.pad(x.gather(1, order.unsqueeze(-1).expand_as(x)), (0, 0, 0, padding)).view(
        batch, count, span, width
    )
    real = F.pad(mask.gather(1, order), (0, padding)).view(batch, count, span)  # [B, S, T]
    routing = router(masked_mean(tokens, real))  # [B, S, N], each segment by its own mean
    counts = real.any(-1) if real.dtype == torch.bool else real.sum(-1) > 0  # [B, S]
    if grouping.first_segment == "prior":
        prior = router.route_prior(batch)
        first = prior.weights.unsqueeze(1)  # [B, 1, N]
        routing = _prepend(prior, routing)
        counts = torch.cat([torch.ones_like(counts[:, :1]), counts], dim=1)
        own = routing.weights[:, 1:]
    else:
        own = routing.weights
        first = own[:, :1].detach()
    weights = torch.cat([first.to(own.dtype), own[:, :-1]], dim=1)  # segment j is served by segment j - 1

    def restore(y: Tensor) -> Tensor:
        flat = y.view(batch, count * span, -1)[:, :length]  # [B, L, out]
        return torch.zeros_like(flat).scatter(1, order.unsqueeze(-1).expand_as(flat), flat)

    return Groups(tokens.flatten(0, 1), weights.flatten(0, 1), routing, counts, restore)


def _from_first_token(mask: Tensor) -> Tensor:
    """Return positions [B, L] that turn each row so that it begins with its first token: left padding goes last."""
    length = mask.shape[1]
    start = mask.to(torch.int8).argmax(dim=1, keepdim=True)  # the first of equal maxima
    return (torch.arange(length, device=mask.device) + start) % length


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
