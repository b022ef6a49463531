"""`smoe`: a sparse mixture of experts, the baseline that mixes outputs and merges nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from camex_ft.protocols import protocol

if TYPE_CHECKING:
    from torch import Tensor


@protocol(
    "smoe",
    summary="sparse mixture: top-k experts' outputs, per token",
    source="Shazeer et al. 2017 (arXiv 1701.06538)",
    form="outputs",
    granularities=("token",),
)
def smoe(tau: Tensor) -> None:
    """y_t = sum_i s_ti FFN_i(x_t) over the k experts of token t; softmax over those k.

    Convention: whole feed-forward experts are mixed, after their non-linearity; no capacity limit, no dropped token.
    """
