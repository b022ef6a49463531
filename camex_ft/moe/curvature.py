"""Curvature: a learned Kronecker-factored map on domain vectors, one for every expert.

    M_i tau = sum_{r=1..R} (A1_ri (x) A2_ri) tau (C1_ri (x) C2_ri)^T

tau is [out, in]; A1 [a1, a1] and A2 [a2, a2] factor out = a1 * a2, C1 and C2 factor in = c1 * c2. Viewed as a tensor
[a1, a2, c1, c2], tau is multiplied by one factor along each of its four axes, so the map costs
2 * R * N * out * in * (a1 + a2 + c1 + c2) operations and never makes an [out, out] matrix.
A bias b of [out] is viewed as [a1, a2] and mapped to sum_r A_ri b B_ri^T by factors of its own.

Source: CAMEx (arXiv 2502.18821, section 3.2), where the R terms start equal and so stay equal: here the first term
starts as the identity and each further term as 0 times a random orthogonal map, so that the sum is the identity for
every R and the terms come to differ.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from camex_ft.moe.kronecker import Factors


def nearest_factors(n: int) -> tuple[int, int]:
    """Return (p, q) with p * q = n, p <= q and p as large as can be: 768 -> (24, 32); a prime gives (1, n)."""
    p = int(n**0.5)
    while n % p:
        p -= 1
    return p, n // p


def curve_bias(tau: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    """Return sum_r B1_ri tau_i B2_ri^T for biases.

    Args:
        tau: domain vectors of the bias; [N, out], viewed as [N, a1, a2].
        b1: [R, N, a1, a1].
        b2: [R, N, a2, a2].
    """
    viewed = tau.reshape(tau.shape[0], b1.shape[-1], b2.shape[-1])  # [N, a1, a2]
    return (b1 @ viewed @ b2.mT).sum(0).reshape(tau.shape)


class Curvature(nn.Module):
    """The curvature of one linear map's experts; the identity at initialisation for every rank.

    Args:
        out_features, in_features: shape of the map.
        experts: N.
        rank: R, the number of Kronecker terms.
        bias: make factors for the bias as well.
    """

    a1: nn.Parameter
    a2: nn.Parameter
    c1: nn.Parameter
    c2: nn.Parameter
    b1: nn.Parameter | None
    b2: nn.Parameter | None

    def __init__(self, *, out_features: int, in_features: int, experts: int, rank: int, bias: bool) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"curvature rank is {rank}: expected at least 1")
        (p, q), (u, v) = nearest_factors(out_features), nearest_factors(in_features)
        for name, size in (("a1", p), ("a2", q), ("c1", u), ("c2", v)):
            self.register_parameter(name, nn.Parameter(torch.empty(rank, experts, size, size)))
        for name, size in (("b1", p), ("b2", q)):
            factor = nn.Parameter(torch.empty(rank, experts, size, size)) if bias else None
            self.register_parameter(name, factor)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """First term: the identity. Further terms: 0 in the leading factor, random orthogonal in the others."""
        for name, factor in self.named_parameters():
            factor[0].copy_(torch.eye(factor.shape[-1]).expand_as(factor[0]))
            for block in factor[1:].flatten(0, 1):
                nn.init.zeros_(block) if name in ("a1", "b1") else nn.init.orthogonal_(block)

    @property
    def factors(self) -> Factors:
        """The weight's factors."""
        return Factors(self.a1, self.a2, self.c1, self.c2)

    def forward_bias(self, tau: Tensor) -> Tensor:
        """Return the curved domain vectors of the bias; [N, out]."""
        assert self.b1 is not None and self.b2 is not None
        return curve_bias(tau, self.b1, self.b2)


@torch.no_grad()
def distance_from_identity(factors: Factors) -> Tensor:
    """Return ||M_i - I||_F / ||I||_F per expert; [N], float64.

    Uses <M, M> = sum_{r,t} prod_F tr(F_r^T F_t) and <M, I> = sum_r prod_F tr(F_r): no large matrix is made.
    """
    experts = factors.a1.shape[1]
    gram = factors.a1.new_ones(1, 1, experts, dtype=torch.float64)
    trace = factors.a1.new_ones(1, experts, dtype=torch.float64)
    size = 1.0
    for factor in factors:
        f = factor.double()
        gram = gram * torch.einsum("rnij,tnij->rtn", f, f)
        trace = trace * torch.einsum("rnii->rn", f)
        size *= f.shape[-1]
    squared = gram.sum((0, 1)) - 2 * trace.sum(0) + size
    return (squared.clamp_min(0) / size).sqrt()


@torch.no_grad()
def condition_number(factors: Factors) -> Tensor | None:
    """Return the condition number of M_i per expert; [N], float64: the product of its factors'. None for R > 1,
    where it does not follow from the factors' own."""
    if factors.a1.shape[0] > 1:
        return None
    condition = factors.a1.new_ones(factors.a1.shape[1], dtype=torch.float64)
    for factor in factors:
        condition = condition * torch.linalg.cond(factor[0].double())
    return condition
