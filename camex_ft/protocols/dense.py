"""`dense`: the backbone as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from camex_ft.protocols import protocol

if TYPE_CHECKING:
    from torch import Tensor


@protocol(
    "dense",
    summary="the original feed-forward layers",
    source="the backbone",
    form="dense",
)
def dense(tau: Tensor) -> None:
    """Leave every feed-forward layer as it is: no experts, no router. The baseline that all others start from."""
