"""`smear`: Euclidean (soft) merging of the experts themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from camex_ft.protocols import protocol

if TYPE_CHECKING:
    from torch import Tensor


@protocol(
    "smear",
    summary="soft merging: the weighted mean of the experts' weights",
    source="SMEAR, Muqeeth et al. 2023 (arXiv 2306.03745)",
    base=False,
)
def smear(tau: Tensor) -> None:
    """E_hat = sum_i s_i E_i.

    Convention: no base expert and no step size alpha; `domain` at alpha = 1 equals it, whatever the base.
    """
