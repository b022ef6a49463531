"""`dare` and `dare-ca`: entries of domain vectors are dropped at random in training and the rest rescaled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Lt

from camex_ft.protocols import protocol

if TYPE_CHECKING:
    from torch import Generator, Tensor


@protocol(
    "dare",
    summary="domain vectors with entries dropped at random in training, the rest rescaled",
    source="DARE, Yu et al. 2024 (arXiv 2311.03099), as in CAMEx (arXiv 2502.18821)",
)
def dare(
    tau: Tensor, *, training: bool, generator: Generator, drop: Annotated[float, Ge(0), Lt(1)] = 0.1
) -> Tensor | None:
    """multiplier_i ~ Bernoulli(1 - drop) / (1 - drop) in training, 1 in evaluation, entry by entry.

    Convention: one draw a forward pass and matrix, shared by all samples; the mean of E_hat is unchanged.

    Args:
        tau: domain vectors; [N, ...].
        training: whether to drop at all.
        generator: source of the draw, seeded for this step.
        drop: p, the probability that an entry is dropped.
    """
    import torch

    if not training or drop == 0:
        return None
    mask = torch.empty_like(tau).bernoulli_(1 - drop, generator=generator)
    return mask.div_(1 - drop)
