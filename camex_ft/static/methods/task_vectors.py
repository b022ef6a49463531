"""Sums of task vectors tau_i = theta_i - theta_0: `arithmetic`, `ties`, `dare` and `dare-ties`.

Which task vectors elect a sign, and by which number a sum is divided, differs between libraries: `elect` and `divide`
name both conventions.

    elect: weighted      sign of sum_j w_j tau_j                      mergekit
    elect: unweighted    sign of sum_j tau_j                          the paper, PEFT
    divide: weights      by the sum of the weights that agree         mergekit (normalize: true)
    divide: count        by the number of task vectors that agree     the paper, PEFT
    divide: none         not divided                                  mergekit (normalize: false)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, Le

from camex_ft.static.methods import along, method, weighted

if TYPE_CHECKING:
    from torch import Generator, Tensor

Density = Annotated[float, Gt(0), Le(1)]
Elect = Literal["weighted", "unweighted"]
Divide = Literal["weights", "count", "none"]
SCALES = (0.0, 1.5)
DENSITIES = (0.05, 1.0)
SMALL = 1e-8  # a sum of weights that does not divide


def magnitude_threshold(tau: Tensor, *, density: float) -> Tensor:
    """Return the least magnitude among the `density` largest entries of one task vector; a number.

    Convention: max(1, int(density * entries)) entries of each tensor take part, as in mergekit; entries as large as the
    least of them take part as well.
    """
    magnitudes = tau.abs().flatten().numpy()  # partitioned in place: `kthvalue` takes three times the memory
    count = max(1, int(density * magnitudes.size))
    magnitudes.partition(magnitudes.size - count)
    return tau.new_tensor(magnitudes[magnitudes.size - count] if count < magnitudes.size else 0.0)


@method(
    "arithmetic",
    summary="start plus the scaled sum of weighted task vectors",
    source="Task arithmetic, Ilharco et al. 2023 (arXiv 2212.04089)",
    ranges={"scale": SCALES},
)
def arithmetic(start: Tensor, tau: Tensor, *, weights: Tensor, scale: float = 1.0) -> Tensor:
    """theta = theta_0 + scale * sum_i w_i tau_i.

    Convention: weights are not divided by their sum. A negative weight forgets what a donor has learnt.

    Args:
        start: theta_0; [...].
        tau: [N, ...].
        weights: w; [N].
        scale: of the sum.
    """
    return start + scale * weighted(tau, weights).sum(0)


@method(
    "ties",
    summary="largest entries of the task vectors, where they agree with the elected sign",
    source="TIES-Merging, Yadav et al. 2023 (arXiv 2306.01708)",
    per_donor=magnitude_threshold,
    ranges={"scale": SCALES, "density": DENSITIES},
)
def ties(
    start: Tensor,
    tau: Tensor,
    *,
    weights: Tensor,
    thresholds: Tensor,
    density: Density = 0.2,
    scale: float = 1.0,
    elect: Elect = "weighted",
    divide: Divide = "weights",
) -> Tensor:
    """theta = theta_0 + scale * sum_i w_i a_i t_i / d with t_i = tau_i trimmed, a_i = [sign(t_i) = elected sign].

    Convention: each tensor of each donor is trimmed by itself, to its `density` largest magnitudes; the paper trims all
    of a donor's tensors together. The elected sign of a sum that is 0 is positive. `elect` and `divide` are those of
    mergekit by default; with equal weights they are the paper's and PEFT's too. Where no task vector agrees, or their
    weights cancel, d is 1.

    Args:
        start: theta_0; [...].
        tau: [N, ...].
        weights: w; [N].
        thresholds: least magnitude of each donor's entries that take part; [N].
        density: fraction of each task vector's entries that takes part; 1 trims nothing.
        scale: of the sum.
        elect: task vectors that elect the sign: weighted or unweighted.
        divide: by the agreeing weights' sum (weights), the number of agreeing task vectors (count), or not (none).
    """
    trimmed = tau * (tau.abs() >= along(thresholds, tau))
    return start + scale * disjoint_sum(trimmed, weights, elect=elect, divide=divide)


@method(
    "dare",
    summary="task vectors with entries dropped at random and the rest rescaled, then arithmetic",
    source="DARE, Yu et al. 2024 (arXiv 2311.03099)",
    ranges={"scale": SCALES, "density": DENSITIES},
)
def dare(
    start: Tensor,
    tau: Tensor,
    *,
    weights: Tensor,
    generator: Generator,
    density: Density = 0.5,
    scale: float = 1.0,
) -> Tensor:
    """theta = theta_0 + scale * sum_i w_i m_i tau_i / density with m_i ~ Bernoulli(density), entry by entry.

    Convention: `density` keeps, where the paper's p = 1 - density drops. The rest is divided by `density`, as in the
    paper and in PEFT, so that the mean over draws is task arithmetic; mergekit's `rescale` instead restores the sum of
    magnitudes of each tensor.

    Args:
        start: theta_0; [...].
        tau: [N, ...].
        weights: w; [N].
        generator: source of the draw.
        density: probability that an entry takes part.
        scale: of the sum.
    """
    return arithmetic(start, dropped(tau, density=density, generator=generator), weights=weights, scale=scale)


@method(
    "dare-ties",
    summary="task vectors with entries dropped at random, where they agree with the elected sign",
    source="DARE, Yu et al. 2024 (arXiv 2311.03099), with TIES in place of the sum",
    ranges={"scale": SCALES, "density": DENSITIES},
)
def dare_ties(
    start: Tensor,
    tau: Tensor,
    *,
    weights: Tensor,
    generator: Generator,
    density: Density = 0.5,
    scale: float = 1.0,
    elect: Elect = "weighted",
    divide: Divide = "none",
) -> Tensor:
    """theta = theta_0 + scale * sum_i w_i a_i t_i / d with t_i = m_i tau_i / density, m_i as in `dare`.

    Convention: the draw is `dare`'s, and takes the place of the trimming in `ties`; a_i and d are those of `ties`. By
    default the sum is not divided, as in mergekit; PEFT divides by the count, of unweighted votes.

    Args:
        start: theta_0; [...].
        tau: [N, ...].
        weights: w; [N].
        generator: source of the draw.
        density: probability that an entry takes part.
        scale: of the sum.
        elect, divide: as of `ties`.
    """
    draw = dropped(tau, density=density, generator=generator)
    return start + scale * disjoint_sum(draw, weights, elect=elect, divide=divide)


def dropped(tau: Tensor, *, density: float, generator: Generator) -> Tensor:
    """Return task vectors with every entry kept with the probability `density`, and divided by it."""
    import torch

    if density == 1:
        return tau
    return tau * torch.empty_like(tau).bernoulli_(density, generator=generator) / density


def disjoint_sum(tau: Tensor, weights: Tensor, *, elect: Elect, divide: Divide) -> Tensor:
    """Return the weighted sum over the task vectors whose sign is the elected one, divided as `divide` says.

    Args:
        tau: trimmed; [N, ...].
        weights: [N].
        elect, divide: as of `ties`.
    """
    import torch

    terms = weighted(tau, weights)
    voters = terms if elect == "weighted" else tau
    agree = voters.sign() == torch.where(voters.sum(0) >= 0, 1, -1)
    total = (terms * agree).sum(0)
    if divide == "none":
        return total
    divisor = agree.sum(0).to(total) if divide == "count" else (along(weights, tau) * agree).sum(0)
    return total / torch.where(divisor.abs() < SMALL, 1, divisor)
