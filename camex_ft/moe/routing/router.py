"""Routing: the experts that serve a group of tokens, and their weights.

    logits  = pooled(x) W_g [+ b]                        linear, with an intercept b where it is fitted [G, N]
            = cos(pooled(x), W_g,i) / t                  cosine, with a learned temperature t
            [+ N(0, 1) * (softplus(pooled(x) W_n) + 1e-2), in training]
    s       = softmax(logits / T) over the k largest logits, 0 elsewhere           normalise: after     [G, N]
            = softmax(logits / T) over all, 0 but for the k largest                normalise: before

A row of routing weights serves one group of tokens, by granularity:

    sequence   one group a sequence, routed by the mean of its own tokens; sees the whole sequence
    segment    one group for T tokens, routed by the mean of the segment before: strictly causal (`segments`)
    token      one group a token, routed by itself: causal
    encoder    for decoder layers: one group a sequence, routed by the encoder's pooled output: causal, knows the input

Groups are [G, L', in] with routing weights [G, N], or [G, L', N] for tokens. Padding never counts: not in a mean, not
in the borders of segments, not in the balance loss. With `expert-choice` the experts choose among a sequence's tokens
(`choose`).
Sources: noisy top-k gating of Shazeer et al. 2017 (arXiv 1701.06538, section 2.1), as CAMEx uses it; cosine routing of
Chi et al. 2022 (arXiv 2204.09179); expert choice of Zhou et al. 2022 (arXiv 2202.09368); groups by sequence of CAMEx
(arXiv 2502.18821, section 4 and its published code).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from camex_ft.moe.routing.router_state import LayerRouterState

NOISE_FLOOR = 1e-2
# learned temperature of the cosine router: where it starts, and the least it can be
START, COLDEST = 0.5, 0.01
TINY = 1e-12  # shorter vectors have no direction

RouterKind = Literal["linear", "cosine", "expert-choice"]
Normalise = Literal["after", "before"]
Granularity = Literal["sequence", "segment", "token", "encoder"]
FirstSegment = Literal["prior", "self"]


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """Settings of a router, beside N and k.

    Attributes:
        kind: of the logits; with "expert-choice" the experts choose tokens.
        temperature: T, which divides the logits within the softmax; above 0.
        normalise: softmax "after" the k largest were chosen, over them, or "before", over all.
        z_loss: coefficient of the z-loss.
        intercept: learn an intercept b, as fitted routers need; not of the kind "cosine".
    """

    kind: RouterKind = "linear"
    temperature: float = 1.0
    normalise: Normalise = "after"
    z_loss: float = 0.0
    intercept: bool = False


@dataclass(frozen=True)
class Grouping:
    """Grouping of tokens: granularity, segment length T in tokens, and the routing of the first segment."""

    granularity: Granularity = "sequence"
    segment: int = 256
    first_segment: FirstSegment = "prior"

    @property
    def needs_prior(self) -> bool:
        """Return whether the router must learn a prior."""
        return self.granularity == "segment" and self.first_segment == "prior"


class Routing(NamedTuple):
    """Routing weights, and the values of their computation that the balance loss needs.

    Attributes:
        weights: s, >= 0, each row sums to 1 over its k experts, or to less if it is normalised before; [..., N].
        logits: logits without noise; [..., N].
        noisy: logits with noise, or None where no noise was drawn; [..., N].
        scale: standard deviation of the noise, or None; [..., N].
    """

    weights: Tensor
    logits: Tensor
    noisy: Tensor | None = None
    scale: Tensor | None = None


def topk_softmax(
    logits: Tensor, *, top_k: int, temperature: float = 1.0, normalise: Normalise = "after"
) -> Tensor:
    """Return softmax(logits / T) over the `top_k` largest of the last axis and exact zeros elsewhere.

    Shape and dtype are those of the logits.
    With `normalise` "before", the softmax is over all entries, and the rest of a row sums to less than 1.
    """
    scaled = _scale(logits, temperature)
    if top_k >= logits.shape[-1]:
        return scaled.softmax(dim=-1)
    values, indices = scaled.topk(top_k, dim=-1)
    largest = values.softmax(dim=-1) if normalise == "after" else scaled.softmax(dim=-1).gather(-1, indices)
    return torch.zeros_like(logits).scatter(-1, indices, largest)


def choose(
    logits: Tensor,
    mask: Tensor | None,
    *,
    top_k: int,
    temperature: float = 1.0,
    normalise: Normalise = "after",
) -> Tensor:
    """Return routing weights of tokens that experts choose, each in a sequence the c = ceil(k L / N) best for it.

        p_t  = softmax(logits_t / T)                                                                [..., L, N]
        i takes t      if p_ti is among the c largest of expert i's in the sequence
        s_ti = p_ti / sum_j p_tj over the experts j that took t, 0 for others                       [..., L, N]

    L counts real tokens only, and sequences do not compete: neighbours and padding change nothing. Of equal tokens the
    earlier is taken. A token that none took goes to the expert of its largest p_ti. Those two and the division are this
    package's: every s_t sums to 1, so that equal experts compute what one computes. With `normalise` "before" there is
    no division, as in the paper. Source: Zhou et al. 2022 (arXiv 2202.09368, section 3.2).

    Args:
        logits: of a sequence's tokens; [..., L, N].
        mask: 1 for real tokens; [..., L]; None where all are. What padding gets means nothing.
        top_k: k, how many experts a token has on average.
        temperature: T.
        normalise: whether weights are made to sum to 1 "after" the choice.
    """
    length, experts = logits.shape[-2:]
    scaled = _scale(logits, temperature)
    with torch.no_grad():
        score = scaled.log_softmax(dim=-1)  # p itself would round to 0
        real = score.new_ones(score.shape[:-1], dtype=torch.bool) if mask is None else mask != 0
        score = score.masked_fill(~real.unsqueeze(-1), -math.inf)
        order = score.argsort(dim=-2, descending=True, stable=True)  # [..., L, N]: the tokens, best first
        places = torch.arange(length, device=score.device).unsqueeze(-1).expand_as(order)
        rank = torch.empty_like(order).scatter_(-2, order, places)
        capacity = -(-top_k * real.sum(dim=-1) // experts)  # c; [...]
        taken = (rank < capacity[..., None, None]) & real.unsqueeze(-1)
        own = F.one_hot(scaled.argmax(dim=-1), experts).bool()
        taken = torch.where(taken.any(dim=-1, keepdim=True), taken, own)
    if normalise == "before":
        return torch.where(taken, scaled.softmax(dim=-1), 0)
    return scaled.masked_fill(~taken, -math.inf).softmax(dim=-1)


def _scale(logits: Tensor, temperature: float) -> Tensor:
    """Return logits / T, less the largest where T is not 1, so that no T makes them overflow."""
    if temperature == 1.0:
        return logits
    kind = torch.finfo(logits.dtype)
    below = (logits - logits.amax(dim=-1, keepdim=True).detach()) / max(temperature, kind.tiny)
    return below.clamp_min(kind.min)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of the tokens that count: sum_t m_t x_t / sum_t m_t.

    Args:
        x: tokens; [..., L, in].
        mask: 1 for tokens that count, 0 for padding; [..., L]; None counts all. A row without any token gives 0.
    """
    if mask is None:
        return x.mean(dim=-2)
    m = mask.to(x.dtype).unsqueeze(-1)  # [..., L, 1]
    # a product with 0 would keep the NaN and inf that padding may hold
    total = torch.where(m > 0, x * m, 0).sum(dim=-2)
    return total / m.sum(dim=-2).clamp_min(1)


class Router(nn.Module):
    """The router of one feed-forward layer; all matrices of the layer share its routing weights.

    Args:
        in_features: width of the hidden states.
        experts: N.
        top_k: k, how many experts serve a group.
        noise: draw noise in training; makes W_n a parameter.
        prior: learn logits that serve the first segment of a causal stack, which has no past to be routed by.
        settings: how routing weights are made.

    Attributes:
        fixed: routing weights of every group in place of computed ones; [N]; None: they are computed.
    """

    fixed: Tensor | None = None

    def __init__(
        self,
        *,
        in_features: int,
        experts: int,
        top_k: int,
        noise: bool,
        prior: bool,
        settings: RouterSettings | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k is {top_k}: expected 1 to {experts}, the number of experts")
        self.top_k = top_k
        self.settings = settings or RouterSettings()
        self.gate = nn.Parameter(torch.empty(in_features, experts))  # W_g [in, N]
        self.noise = nn.Parameter(torch.empty(in_features, experts)) if noise else None  # W_n [in, N]
        self.prior = nn.Parameter(torch.empty(experts)) if prior else None  # [N]
        self.intercept = nn.Parameter(torch.empty(experts)) if self.settings.intercept else None  # b [N]
        cosine = self.settings.kind == "cosine"
        self.log_temperature = nn.Parameter(torch.empty(1)) if cosine else None  # log t
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W_g small and at random, so that inputs differ from the first step; W_n, b and the prior start at 0."""
        self.gate.normal_(std=self.gate.shape[0] ** -0.5)
        for parameter in (self.noise, self.intercept, self.prior):
            if parameter is not None:
                parameter.zero_()
        if self.log_temperature is not None:
            self.log_temperature.fill_(math.log(START))

    def forward(self, pooled: Tensor, mask: Tensor | None = None) -> Routing:
        """Route pooled inputs [..., in] in float32 or wider: routing decides between experts, rounding must not.

        Args:
            pooled: one input a group; for expert choice the tokens of sequences, [..., L, in].
            mask: for expert choice, 1 for real tokens; [..., L]; None where all are.
        """
        dtype = torch.promote_types(self.gate.dtype, torch.float32)
        with torch.autocast(device_type=pooled.device.type, enabled=False):
            pooled = pooled.to(dtype)
            return self._route(self._logits(pooled), pooled, mask)

    def route_mean(self, x: Tensor, mask: Tensor | None) -> Routing:
        """Route the mean of the tokens that count; [..., L, in], [..., L] or None -> [..., N]."""
        routing: Routing = self(masked_mean(x, mask))
        return routing

    def route_prior(self, groups: int) -> Routing:
        """Routing of `groups` first segments: the learned prior, the same for each; no noise."""
        if self.prior is None:
            raise ValueError("this router was made without a prior for first segments")
        dtype = torch.promote_types(self.prior.dtype, torch.float32)
        return self._route(self.prior.to(dtype).expand(groups, -1), None, None)

    def _logits(self, pooled: Tensor) -> Tensor:
        """Return logits without noise [..., N]; cosines are of the columns of W_g, over max(t, 0.01)."""
        gate = self.gate.to(pooled.dtype)
        if self.log_temperature is None:
            return (
                pooled @ gate if self.intercept is None else pooled @ gate + self.intercept.to(pooled.dtype)
            )
        t = self.log_temperature.to(pooled.dtype).clamp_min(math.log(COLDEST)).exp()
        return _directions(pooled, dim=-1) @ _directions(gate, dim=0) / t

    def _route(self, logits: Tensor, pooled: Tensor | None, mask: Tensor | None) -> Routing:
        if self.noise is None or pooled is None or not self.training:
            return Routing(self._weights(logits, mask), logits)
        scale = F.softplus(pooled @ self.noise.to(pooled.dtype)) + NOISE_FLOOR
        noisy = logits + torch.randn_like(logits) * scale
        return Routing(self._weights(noisy, mask), logits, noisy, scale)

    def _weights(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        if self.fixed is not None:
            return self.fixed.to(logits).expand_as(logits)
        settings, k, t = self.settings, self.top_k, self.settings.temperature
        if settings.kind == "expert-choice":
            return choose(logits, mask, top_k=k, temperature=t, normalise=settings.normalise)
        return topk_softmax(logits, top_k=k, temperature=t, normalise=settings.normalise)


def _directions(x: Tensor, *, dim: int) -> Tensor:
    """Return vectors of length 1. One of length 0 stays 0, with a finite gradient: its length is taken for 1."""
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / torch.where(length > TINY, length, 1)


@dataclass(frozen=True)
class TokenPositions:
    """Positions of a forward pass's tokens among the real tokens of their rows; the same for all layers of a stack.

    Attributes:
        shape: B, L.
        mask: 1 for real tokens; [B, L]; None where all are.
        before: real tokens of each row in the key-value cache; empty without one.
        after: the same after this forward pass; empty where no later one goes on from it.
        documents: packed documents, numbered within each row; [B, L]; None without packing.
    """

    shape: tuple[int, int]
    mask: Tensor | None = None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    documents: Tensor | None = None

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        mask: Tensor | None = None,
        *,
        before: tuple[int, ...] = (),
        resumable: bool = False,
        documents: Tensor | None = None,
    ) -> TokenPositions:
        """Return the positions in a forward pass over [B, L] tokens.

        Args:
            shape: B, L.
            mask: 1 for real tokens; [B, L]; None where all are.
            before: real tokens of each row in the key-value cache; empty without one.
            resumable: a later forward pass may go on from this one.
            documents: packed documents, numbered within each row; [B, L].
        """
        after: tuple[int, ...] = ()
        if resumable:
            batch, length = shape
            added = [length] * batch if mask is None else (mask != 0).sum(1).tolist()
            mask = None if min(added) == length else mask
            after = tuple(c + n for c, n in zip(before or [0] * batch, added, strict=True))
        return cls(shape, mask, before, after, documents)

    @cached_property
    def order(self) -> Tensor | None:
        """Positions with the real tokens of a row first; [B, L]; None where they are."""
        return None if self.mask is None else (self.mask == 0).to(torch.int8).argsort(dim=1, stable=True)

    @cached_property
    def real(self) -> Tensor | None:
        """Number of real tokens; [B]; None where all are."""
        return None if self.mask is None else (self.mask != 0).sum(1)


class Groups(NamedTuple):
    """Tokens in groups, each with its routing.

    Attributes:
        x: [G, L', in].
        weights: s; [G, N] or [G, L', N].
        routing: every routing that was computed, for the balance loss and the record; [B, N], [B, S, N] or [B, L, N];
            None where a cache goes on and none was.
        mask: 1 for those that hold a token; as routing without N; None where all do.
        restore: [G, L', out] -> [B, L, out]; None where they are the same.
        state: the layer's router state beside a key-value cache, after these tokens.
        served: the router state before them, where each row is one group that it serves.
    """

    x: Tensor
    weights: Tensor
    routing: Routing | None
    mask: Tensor | None
    restore: Callable[[Tensor], Tensor] | None = None
    state: LayerRouterState | None = None
    served: LayerRouterState | None = None


def group(
    x: Tensor,
    positions: TokenPositions,
    router: Router,
    grouping: Grouping,
    state: LayerRouterState | None = None,
    encoded: Tensor | None = None,
) -> Groups:
    """Group and route hidden states by sequence, token or encoder.

    Args:
        x: hidden states; [B, L, in].
        positions: of the tokens.
        router: of the layer.
        grouping: its granularity.
        state: the layer's router state, where a key-value cache goes on.
        encoded: the encoder's pooled output, for granularity "encoder"; [B, in].

    Raises:
        RuntimeError: routing by the encoder without its output.
    """
    if grouping.granularity == "token":
        routing = router(x, positions.mask)  # [B, L, N]
        return Groups(x, routing.weights, routing, positions.mask)
    if grouping.granularity == "sequence":
        routing = router.route_mean(x, positions.mask)  # [B, N]
        return Groups(x, routing.weights, routing, None)
    if state is not None:
        return Groups(x, state.weights[:, 0], None, None, None, state, state)
    if encoded is None:
        raise RuntimeError("routing by the encoder: this forward pass has no encoder output")
    routing = router(encoded)  # [B, N]
    after = LayerRouterState(routing.weights.unsqueeze(1)) if positions.after else None
    return Groups(x, routing.weights, routing, None, None, after)
