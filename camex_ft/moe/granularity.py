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

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from camex_ft.moe.layout import Groups, Layout
from camex_ft.moe.routing import Router, masked_mean
from camex_ft.moe.segments import segments
from camex_ft.moe.state import LayerState

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


class Flow(NamedTuple):
    """How one layer's tokens stand among those that went before.

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
