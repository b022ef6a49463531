"""Singular values of a curvature M_i, a linear map on matrices [out, in], computed from its factors.

    kronecker, rank 1    M_i = A1 (x) A2 (x) C1 (x) C2    products of the factors' singular values     exact
    diagonal             M_i = diag(D_i)                  |D_i|, entry by entry                        exact
    low-rank             M_i = (I + U V^T) (x) (I + P Q^T)    products of both sides' singular values  exact
    kronecker, rank > 1  a sum of products                Ritz values with their weights               estimated

The estimate: k steps of Golub-Kahan bidiagonalisation from a random unit vector v give a bidiagonal B. Its singular
values, each with the squared first entry of its right singular vector, are a Gauss quadrature of the distribution of
M_i's singular values, weighted by v. Vectors are not orthogonalised again: a value that returns shares its weight.
Source: Golub and Meurant, "Matrices, Moments and Quadrature" (2010), chapters 4 and 7.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from camex_ft.moe.curvature.base import Factors
from camex_ft.moe.curvature.diagonal import DiagonalFactors
from camex_ft.moe.curvature.low_rank import LowRankFactors

Quadrature = tuple[np.ndarray, np.ndarray]  # values and their weights; [k] each

POINTS = 41  # of a distribution
STEPS = 16
MOST = 1 << 22  # products of two sides' values
NEGLIGIBLE = 1e-12  # weight of values that come from rounding
SMALL = 1 << 18  # entries up to which an estimate is made in float64
STARTS = 4  # random vectors for small maps, of which a single one weights the values unevenly


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Singular values of each expert's map.

    Attributes:
        values: at evenly spaced places from the largest to the smallest; [N, POINTS].
        exact: computed from the factors, not estimated.
    """

    values: np.ndarray
    exact: bool


@torch.no_grad()
def spectrum(factors: Factors, *, kind: str, shape: tuple[int, int]) -> Spectrum:
    """Return the singular values of every M_i.

    Args:
        factors: of the curvature of one matrix.
        kind: as in `moe.curvature.KINDS`.
        shape: of the matrix, (out, in).
    """
    experts = list(_each(factors))
    if kind == "diagonal":
        values = [_diagonal(one) for one in experts]
    elif kind == "low-rank":
        values = [_low_rank(one) for one in experts]
    elif factors.rank == 1:
        values = [
            _products(*(np.linalg.svd(f[0, 0], compute_uv=False) for f in _doubles(one))) for one in experts
        ]
    else:
        values = [_estimated(one, shape) for one in experts]
        return Spectrum(values=np.stack(values), exact=False)
    return Spectrum(values=np.stack([_places(v) for v in values]), exact=True)


def _each(factors: Factors) -> Iterator[Factors]:
    """Yield the factors of one expert after another; [R, 1, ...]."""
    tensors, kind = list(factors), cast(Any, type(factors))
    for i in range(tensors[0].shape[1]):
        yield kind(*(t[:, i : i + 1] for t in tensors))


def _doubles(factors: Factors) -> list[np.ndarray]:
    return [t.double().cpu().numpy() for t in factors]


def _places(values: np.ndarray) -> np.ndarray:
    """Return the values at evenly spaced places of their order, largest first; [POINTS]."""
    ordered = np.sort(values)[::-1]
    return np.interp(np.linspace(0, 1, POINTS), np.linspace(0, 1, len(ordered)), ordered)


def _products(*sides: np.ndarray) -> np.ndarray:
    """Return all products of one value of each side; if there are too many, an even selection with both ends."""
    products = np.ones(1)
    for side in sides:
        while products.size * side.size > MOST:
            if products.size >= side.size:
                products = _halved(products)
            else:
                side = _halved(side)
        products = np.outer(products, side).ravel()
    return products


def _halved(values: np.ndarray) -> np.ndarray:
    ordered = np.sort(values)
    return ordered[np.linspace(0, len(ordered) - 1, len(ordered) // 2).round().astype(int)]


def _diagonal(factors: Factors) -> np.ndarray:
    u, v = cast(DiagonalFactors, factors)
    diagonal_ = u[:, 0].double().mT @ v[:, 0].double()  # [out, in]
    return diagonal_.abs().flatten().cpu().numpy()


def _low_rank(factors: Factors) -> np.ndarray:
    u, v, p, q = (f[:, 0] for f in _doubles(cast(LowRankFactors, factors)))  # [R, k] each
    return _products(_of_side(u, v), _of_side(p, q))


def _of_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the singular values of I + left^T right, of size k, from a small matrix; left and right are [R, k].

    With an orthonormal basis Q of both, the map is the identity outside of Q and I + Q^T left^T right Q inside.
    """
    basis = np.linalg.qr(np.concatenate([left, right]).T)[0]  # [k, m]
    inside = np.eye(basis.shape[1]) + (basis.T @ left.T) @ (right @ basis)
    outside = np.ones(left.shape[1] - basis.shape[1])
    return np.concatenate([np.linalg.svd(inside, compute_uv=False), outside])


def _estimated(factors: Factors, shape: tuple[int, int]) -> np.ndarray:
    """Return the values at evenly spaced places, read off the estimated distribution; [POINTS]."""
    starts = STARTS if shape[0] * shape[1] <= SMALL else 1
    quadratures = [ritz(factors, shape, seed=seed) for seed in range(starts)]
    values, weights = (np.concatenate(part) for part in zip(*quadratures, strict=True))
    values, weights = values[weights > NEGLIGIBLE], weights[weights > NEGLIGIBLE]
    order = np.argsort(values)[::-1]
    values, weights = values[order], weights[order] / weights.sum()
    middle = np.cumsum(weights) - weights / 2
    return np.interp(np.linspace(0, 1, POINTS), np.r_[0, middle, 1], np.r_[values[0], values, values[-1]])


@torch.no_grad()
def ritz(
    factors: Factors, shape: tuple[int, int], *, seed: int = 0, steps: int = STEPS
) -> tuple[np.ndarray, np.ndarray]:
    """Return Ritz values of one expert's map and their weights, which sum to 1; [k] each, k <= steps.

    Args:
        factors: of one expert; [R, 1, ...].
        shape: of the matrix, (out, in).
        seed: of the start.
        steps: of the bidiagonalisation.
    """
    device, kind = "cuda" if torch.cuda.is_available() else "cpu", cast(Any, type(factors))
    dtype = torch.float64 if shape[0] * shape[1] <= SMALL else torch.float32
    own = kind(*(t.to(device, dtype).contiguous() for t in factors))
    start = torch.Generator().manual_seed(seed)
    v = torch.randn(1, *shape, generator=start, dtype=torch.float64).to(device, dtype)
    v, u, beta = v / v.norm(), torch.zeros_like(v), 0.0
    diagonals: list[float] = []
    above: list[float] = []
    for _ in range(min(steps, v.numel())):
        u = own.transform(v, None) - beta * u  # M v
        alpha = float(u.norm())
        diagonals.append(alpha)
        u = u / max(alpha, torch.finfo(dtype).tiny)
        w = _transposed(own, u) - alpha * v  # M^T u
        beta = float(w.norm())
        above.append(beta)
        if beta <= 16 * torch.finfo(dtype).eps * max(diagonals):
            break  # v lies in an invariant space of M: all of its values are there
        v = w / beta
    bidiagonal = np.diag(diagonals) + np.diag(above[:-1], 1)
    _, values, right = np.linalg.svd(bidiagonal)
    return values, right[:, 0] ** 2


def _transposed(factors: Factors, u: Tensor) -> Tensor:
    """Return M^T u; [1, out, in]."""
    result = u.clone()
    factors.transform_backward(result, u, None, learn=False)
    return result
