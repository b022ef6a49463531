"""`domain` and `domain-ca`: weighted domain vectors, as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from camex_ft.protocols import protocol

if TYPE_CHECKING:
    from torch import Tensor


@protocol(
    "domain",
    summary="base expert plus the weighted domain vectors",
    source="task arithmetic, Ilharco et al. 2023 (arXiv 2212.04089), with routing weights",
)
def domain(tau: Tensor) -> None:
    """E_hat = E_m + alpha * sum_i s_i tau_i, and with curvature E_m + alpha * sum_i s_i M_i tau_i.

    Convention: domain vectors are taken whole; nothing is trimmed, elected or dropped.
    """
