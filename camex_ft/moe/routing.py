"""Routing: which experts serve an input, and with what weights.

    logits  = pooled(x) W_g  [+ N(0, 1) * (softplus(pooled(x) W_n) + 1e-2), in training]      [G, N]
    s       = softmax over the k largest logits, 0 elsewhere                                 [G, N]

A row of routing weights serves one *group* of tokens: a sequence, a segment of a sequence, or a token.
Source: noisy top-k gating of Shazeer et al. 2017 (arXiv 1701.06538, section 2.1), as CAMEx uses it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NOISE_FLOOR = 1e-2


class Routing(NamedTuple):
    """Routing weights and what the balance loss needs to know of how they came about.

    Attributes:
        weights: s, >= 0, each row sums to 1 over its k experts; [..., N].
        logits: logits without noise; [..., N].
        noisy: logits with noise, or None where no noise was drawn; [..., N].
        scale: standard deviation of the noise, or None; [..., N].
    """

    weights: Tensor
    logits: Tensor
    noisy: Tensor | None = None
    scale: Tensor | None = None


def topk_softmax(logits: Tensor, *, top_k: int) -> Tensor:
    """Return softmax over the `top_k` largest of the last axis and exact zeros elsewhere; same shape and dtype."""
    if top_k >= logits.shape[-1]:
        return logits.softmax(dim=-1)
    values, indices = logits.topk(top_k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, indices, values.softmax(dim=-1))


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
    """

    def __init__(self, *, in_features: int, experts: int, top_k: int, noise: bool, prior: bool) -> None:
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k is {top_k}: expected 1 to {experts}, the number of experts")
        self.top_k = top_k
        self.gate = nn.Parameter(torch.empty(in_features, experts))  # W_g [in, N]
        self.noise = nn.Parameter(torch.empty(in_features, experts)) if noise else None  # W_n [in, N]
        self.prior = nn.Parameter(torch.empty(experts)) if prior else None  # [N]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W_g small and at random, so that inputs differ from the first step; W_n and the prior start at 0."""
        self.gate.normal_(std=self.gate.shape[0] ** -0.5)
        for parameter in (self.noise, self.prior):
            if parameter is not None:
                parameter.zero_()

    def forward(self, pooled: Tensor) -> Routing:
        """Route pooled inputs [..., in] in float32 or wider: routing decides between experts, rounding must not."""
        dtype = torch.promote_types(self.gate.dtype, torch.float32)
        with torch.autocast(device_type=pooled.device.type, enabled=False):
            pooled = pooled.to(dtype)
            return self._route(pooled @ self.gate.to(dtype), pooled)

    def route_prior(self, groups: int) -> Routing:
        """Routing of `groups` first segments: the learned prior, the same for each; no noise."""
        if self.prior is None:
            raise ValueError("this router was made without a prior for first segments")
        dtype = torch.promote_types(self.prior.dtype, torch.float32)
        return self._route(self.prior.to(dtype).expand(groups, -1), None)

    def _route(self, logits: Tensor, pooled: Tensor | None) -> Routing:
        if self.noise is None or pooled is None or not self.training:
            return Routing(topk_softmax(logits, top_k=self.top_k), logits)
        scale = F.softplus(pooled @ self.noise.to(pooled.dtype)) + NOISE_FLOOR
        noisy = logits + torch.randn_like(logits) * scale
        return Routing(topk_softmax(noisy, top_k=self.top_k), logits, noisy, scale)
