"""`fisher`: domain vectors weighted by a running diagonal Fisher information."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Lt

from camex_ft.protocols import protocol

if TYPE_CHECKING:
    from torch import Tensor


def running(statistic: Tensor, gradient: Tensor, *, decay: Annotated[float, Ge(0), Lt(1)] = 0.99) -> Tensor:
    """Return F <- decay * F + (1 - decay) * g^2: the running mean of squared gradients."""
    return decay * statistic + (1 - decay) * gradient.square()


@protocol(
    "fisher",
    summary="domain vectors weighted by the running mean of their squared gradients",
    source="Fisher merging, Matena & Raffel 2022 (arXiv 2111.09832), with routing weights",
    pointwise=lambda **options: True,
    update=running,
    twin=False,
)
def fisher(
    tau: Tensor, *, statistic: Tensor | None = None, damping: Annotated[float, Gt(0)] = 0.1
) -> Tensor | None:
    """F_i <- decay F_i + (1 - decay) g_i^2 at every optimizer step, with g_i the gradient of T_i = multiplier_i *
    tau_i; multiplier_i = (F_i + damping * F) / ((1 + damping) * F) with F = 1/N sum_j F_j, entry by entry, and 1 where
    F is 0.

    Convention: weights are relative, with mean 1 over the experts, and routing weights stand beside them; with one-hot
    routing the result is E_m + multiplier_i * tau_i and not expert i. g is the gradient of the mean loss of a batch
    (the empirical Fisher of batches), after clipping, and that of T: a large weight does not make itself larger.
    `damping` makes every weight positive, so that an expert that top-k routing has not chosen yet can still learn. The
    F_i take as much memory as the experts and are saved with them.

    Args:
        tau: domain vectors; [N, ...].
        statistic: F_i; as tau, or None before there is any.
        damping: share of the mean that every expert is granted.
        decay: of the running mean.
    """
    import torch

    if statistic is None:
        return None
    mean = statistic.mean(0)
    multiplier = (statistic + damping * mean) / ((1 + damping) * mean)
    return torch.where(mean > 0, multiplier, 1).to(tau.dtype)
