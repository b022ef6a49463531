"""Means of weights: `average`, `slerp`, and those weighted by statistics of texts, `fisher` and `regmean`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Le

from camex_ft.static.methods import method, weighted

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 20  # entries


@method(
    "average",
    summary="weighted mean of the donors",
    source="Model soups, Wortsman et al. 2022 (arXiv 2203.05482)",
)
def average(donors: Tensor, *, weights: Tensor) -> Tensor:
    """theta = sum_i w_i theta_i / sum_i w_i.

    Convention: weights are divided by their sum, so [1, 1, 2] and [0.25, 0.25, 0.5] are the same. The start has no
    weight.

    Args:
        donors: [N, ...].
        weights: w; [N].
    """
    return weighted(donors, weights).sum(0) / weights.sum()


@method(
    "slerp",
    summary="point between two donors on the arc through them",
    source="Shoemake 1985, Animating rotation with quaternion curves; on whole tensors as in mergekit",
    pointwise=False,
    count=2,
    ranges={"t": (0, 1)},
)
def slerp(
    donors: Tensor,
    *,
    t: Annotated[float, Ge(0), Le(1)] = 0.5,
    straight: Annotated[float, Gt(0), Le(1)] = 0.9995,
) -> Tensor:
    """theta = (sin((1 - t) phi) theta_1 + sin(t phi) theta_2) / sin(phi), phi the angle between the two tensors.

    Convention: a tensor is one vector, of all its entries, and is not normalised: only the angle is that of the
    directions. Nearly parallel tensors, and opposite ones, are interpolated on the straight line. The donors' weights
    are not used.

    Args:
        donors: [2, ...].
        t: position between the donors: 0 is the first and 1 the second.
        straight: absolute cosine from which on the line is straight.
    """
    import torch

    gram = torch.zeros(2, 2, dtype=torch.float64)
    for part in donors.flatten(1).split(CHUNK, dim=1):  # few of the entries are in float64 at a time
        gram += part.double() @ part.double().T
    norms = gram.diagonal().prod().sqrt()
    cosine = (gram[0, 1] / norms).clamp(-1, 1) if norms > 0 else torch.tensor(1.0)
    shares = [1 - t, t]
    if cosine.abs() <= straight:
        angle = float(torch.acos(cosine))
        shares = [math.sin(share * angle) / math.sin(angle) for share in shares]
    return shares[0] * donors[0] + shares[1] * donors[1]


@method(
    "fisher",
    summary="mean of the donors, each entry weighted by its Fisher information on the donor's texts",
    source="Fisher merging, Matena & Raffel 2022 (arXiv 2111.09832), equation 4",
    statistic="fisher",
)
def fisher(
    donors: Tensor, *, weights: Tensor, statistic: Tensor, floor: Annotated[float, Gt(0)] = 1e-6
) -> Tensor:
    """theta = sum_i w_i F_i theta_i / sum_i w_i F_i, entry by entry, with F_i = max(mean over rows of g^2, floor).

    Convention: g is the gradient of the loss of one row with the labels of the data (the empirical Fisher), at donor i,
    in evaluation mode. Entries that no donor's texts touch have F_i = floor for every i: their weighted mean.

    Args:
        donors: [N, ...].
        weights: w; [N].
        statistic: mean square of the gradient; [N, ...].
        floor: least Fisher information of an entry.
    """
    information = weighted(statistic.clamp(min=floor), weights)
    return (information * donors).sum(0) / information.sum(0)


@method(
    "regmean",
    summary="least-squares fit of each linear map to the outputs of the donors' maps on their own texts",
    source="RegMean, Jin et al. 2023 (arXiv 2212.09849), equation 2, with the scaled off-diagonal of section 3.3",
    statistic="gram",
    pointwise=False,
)
def regmean(
    donors: Tensor,
    *,
    weights: Tensor,
    statistic: Tensor | None,
    transposed: bool = False,
    alpha: Annotated[float, Ge(0), Le(1)] = 0.9,
) -> Tensor:
    """W = (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1 for a linear map y = W x, G_i = alpha X_i + (1 - alpha) diag(X_i).

    Convention: X_i = E[x x^T] is the mean over the real tokens of donor i's texts and not their sum, so that longer
    texts have no more weight. Inputs that are 0 on all texts do not determine their column: it is the weighted mean.
    Tensors that are no matrix of a linear map (embeddings, also where a head is tied to them, norms, biases) are
    averaged.

    Args:
        donors: [N, out, in], or [N, in, out] if `transposed`.
        weights: w; [N].
        statistic: X; [N, in, in], or None for a tensor that is no linear map's matrix.
        transposed: see `donors`.
        alpha: factor of the entries off the diagonal; 1 is the plain least-squares fit.
    """
    import torch

    mean = average(donors, weights=weights)
    if statistic is None:
        return mean
    gram = weighted(statistic.double(), weights.double())
    diagonal = torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    gram = alpha * gram + (1 - alpha) * diagonal
    maps = donors.double().mT if transposed else donors.double()
    total = gram.sum(0)
    # W = mean + R total^-1, R = sum_i (W_i - mean) G_i: the minimum-norm solution leaves undetermined parts at the mean
    centre = mean.double().mT if transposed else mean.double()
    rest = ((maps - centre) @ gram).sum(0)
    merged = centre + torch.linalg.lstsq(total, rest.mT, driver="gelsd").solution.mT
    return (merged.mT if transposed else merged).to(donors.dtype)
