"""Curvature: a learned linear map on domain vectors, one for every expert, the identity at initialisation.

    kronecker   M_i tau = sum_{r=1..R} (A1_ri (x) A2_ri) tau (C1_ri (x) C2_ri)^T      CAMEx's choice
    diagonal    M_i tau = (sum_{r=1..R} u_ri v_ri^T) * tau                            entry by entry
    low-rank    M_i tau = (I + U_i V_i^T) tau (I + P_i Q_i^T)^T                       R columns in each of U, V, P, Q

tau is [out, in]. The bias has factors of its own, of the same kind. `KINDS` finds a kind by its name; `factors` says
what one needs.

Source: CAMEx (arXiv 2502.18821, section 3.2), where the R terms start equal and so stay equal: here every kind starts
as the identity for every R, with terms that come to differ. The other kinds are there for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from camex_ft.moe.curvature import diagonal, kronecker, low_rank
from camex_ft.moe.curvature.base import BiasFactors, Factors

nearest_factors = kronecker.nearest_factors


class Kind(NamedTuple):
    """Factors of a kind of curvature, for a matrix and for its bias; their fields do not share names."""

    weight: type[Factors]
    bias: type[BiasFactors]


KINDS: Mapping[str, Kind] = {
    "kronecker": Kind(kronecker.Factors, kronecker.BiasFactors),
    "diagonal": Kind(diagonal.Factors, diagonal.BiasFactors),
    "low-rank": Kind(low_rank.Factors, low_rank.BiasFactors),
}


class Curvature(nn.Module):
    """The curvature of one linear map's experts; the identity at initialisation for every kind and rank.

    The parameters' names are the fields of the kind's factors; all have the experts on axis 1.

    Args:
        out_features, in_features: shape of the map.
        experts: N.
        rank: R, the number of terms.
        bias: make factors for the bias as well.
        kind: one of `KINDS`.
    """

    def __init__(
        self,
        *,
        out_features: int,
        in_features: int,
        experts: int,
        rank: int,
        bias: bool,
        kind: str = "kronecker",
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"curvature rank is {rank}: expected at least 1")
        if kind not in KINDS:
            raise ValueError(f"unknown kind of curvature '{kind}': expected one of {', '.join(KINDS)}")
        self.kind = kind
        made = KINDS[kind]
        weight = made.weight.shapes(out=out_features, width=in_features, experts=experts, rank=rank)
        for name, shape in weight.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        own = made.bias.shapes(out=out_features, experts=experts, rank=rank)
        for name, shape in own.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)) if bias else None)
        self.names, self.bias_names = tuple(weight), tuple(own) if bias else ()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make the map the identity, with terms that come to differ in training; nothing on the meta device."""
        if self.get_parameter(self.names[0]).is_meta:
            return
        self.factors.reset()
        if self.bias_factors is not None:
            self.bias_factors.reset()

    @property
    def factors(self) -> Factors:
        """The weight's factors."""
        return KINDS[self.kind].weight.of(getattr(self, name) for name in self.names)

    @property
    def bias_factors(self) -> BiasFactors | None:
        """The bias's factors, or None without a bias."""
        if not self.bias_names:
            return None
        return KINDS[self.kind].bias.of(getattr(self, name) for name in self.bias_names)

    def forward_bias(self, tau: Tensor) -> Tensor:
        """Return the curved domain vectors of the bias; [N, out]."""
        factors = self.bias_factors
        assert factors is not None
        return factors.curve(tau)

    def extra_repr(self) -> str:
        """Return the kind and the rank."""
        return f"kind={self.kind}, rank={self.factors.rank}"


@torch.no_grad()
def distance_from_identity(factors: Factors) -> Tensor:
    """Return ||M_i - I||_F / ||I||_F per expert, without a large matrix; [N], float64."""
    return factors.distance()


@torch.no_grad()
def condition_number(factors: Factors) -> Tensor | None:
    """Return the condition number of M_i per expert, [N] in float64; None where it does not follow cheaply."""
    return factors.condition()
