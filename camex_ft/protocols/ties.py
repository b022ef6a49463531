"""`ties` and `ties-ca`: domain vectors masked to the entries that agree with the elected sign."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Le

from camex_ft.protocols import protocol

if TYPE_CHECKING:
    from torch import Tensor


@protocol(
    "ties",
    summary="domain vectors where their sign agrees with that of their sum",
    source="TIES-Merging, Yadav et al. 2023 (arXiv 2306.01708), as in CAMEx (arXiv 2502.18821)",
    pointwise=lambda density: density == 1,
)
def ties(tau: Tensor, *, density: Annotated[float, Gt(0), Le(1)] = 1.0) -> Tensor:
    """multiplier_i = [sign(tau_i) = sign(sum_j tau_j) or tau_i = 0], entry by entry; T_i = multiplier_i * tau_i.

    Convention: the sign is elected by the plain sum of the domain vectors, without routing weights, and on tau_i itself
    also where curvature follows: T_i = multiplier_i * M_i tau_i. Entries that agree are neither divided by the number
    of agreeing experts nor rescaled. An entry that is exactly 0 has multiplier 1: a multiplier of 0 would stop its
    gradient for good, and an expert that top-k routing has not chosen yet could never leave the base expert.

    Args:
        tau: domain vectors; [N, ...].
        density: fraction of each expert's entries, largest magnitudes first, that takes part; 1 trims nothing. Trimmed
            entries neither vote nor count.
    """
    import torch

    signs = tau.sign()
    if density == 1:
        return _agrees(signs, tau.sum(0).sign())
    large = _largest(tau, density)
    return _agrees(signs, torch.where(large, tau, 0).sum(0).sign()).mul_(large)


def _agrees(signs: Tensor, votes: Tensor) -> Tensor:
    """Return 1 where a sign is 0 or that of the vote, else 0; as `signs`, whose dtype is faster to fill than bool."""
    return (votes - signs).mul_(signs).eq_(0)


def _largest(tau: Tensor, density: float) -> Tensor:
    """Return where |tau_i| is among expert i's `density` largest entries; ties count as large; bool, as tau."""
    magnitude = tau.flatten(1).abs()
    size = magnitude.shape[1]
    rank = size - max(1, round(density * size)) + 1
    return (magnitude >= magnitude.kthvalue(rank, dim=1, keepdim=True).values).view_as(tau)
