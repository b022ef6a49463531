"""Curvature: a learned linear transform of domain vectors, one for every expert, the identity at initialisation.

    kronecker   M_i tau = sum_{r=1..R} (A1_ri (x) A2_ri) tau (C1_ri (x) C2_ri)^T      CAMEx's choice
    diagonal    M_i tau = (sum_{r=1..R} u_ri v_ri^T) * tau                            entry by entry
    low-rank    M_i tau = (I + U_i V_i^T) tau (I + P_i Q_i^T)^T                       R columns in each of U, V, P, Q

tau is [out, in]. The bias has factors of its own, of the same kind.

Source: CAMEx (arXiv 2502.18821, section 3.2), where the R terms start equal and so stay equal: here every kind starts
as the identity for every R, with terms that come to differ. The other kinds are there for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from camex_ft.moe.curvature.base import Curvature, Factors
from camex_ft.moe.curvature.diagonal import DiagonalCurvature
from camex_ft.moe.curvature.kronecker import KroneckerCurvature
from camex_ft.moe.curvature.low_rank import LowRankCurvature

KINDS: Mapping[str, type[Curvature]] = {
    each.kind: each for each in (KroneckerCurvature, DiagonalCurvature, LowRankCurvature)
}


def make_curvature(kind: str = "kronecker", **settings: Any) -> Curvature:
    """Return a curvature of one of the `KINDS`; the settings are those of `Curvature`."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of curvature '{kind}': expected one of {', '.join(KINDS)}")
    return KINDS[kind](**settings)


@torch.no_grad()
def distance_from_identity(factors: Factors) -> Tensor:
    """Return ||M_i - I||_F / ||I||_F per expert, without a large matrix; [N], float64."""
    return factors.distance()


@torch.no_grad()
def condition_number(factors: Factors) -> Tensor | None:
    """Return the condition number of M_i per expert, [N] in float64; None if it does not follow cheaply."""
    return factors.condition()
