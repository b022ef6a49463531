"""Nash bargaining: how far each expert's domain vector may pull the base expert.

    G^T G a = 1 / a,   a > 0,   G = [tau_1 ... tau_N]         1 / a entry by entry

The solution maximises sum_i log <tau_i, G a> over steps G a of a given length: no expert can gain by another step
without another losing more, in proportion. Scaled by the lengths of the domain vectors it is the minimum of

    f(b) = 1/2 b^T K b - sum_i log b_i,      K_ij = <tau_i, tau_j> / (|tau_i| |tau_j|),   a_i = b_i / |tau_i|

which is convex and self-concordant, so that damped Newton steps find it from anywhere: no data-dependent loop, no
gradient, and nothing but the N x N Gram matrix is needed. |G a|^2 = N whatever the lengths.
Source: Nash-MTL, Navon et al. 2022 (arXiv 2202.01017), as NAMEx uses it for experts (arXiv 2510.16138).
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 40
RIDGE = 1e-14  # added to K's diagonal, so that Newton's equations can be solved
# the largest a_i |tau_i|: vectors that cancel each other have no bargain, and would pull ever harder for nothing
LARGEST = 1e5


@torch.no_grad()
def nash_weights(gram: Tensor, *, start: Tensor | None = None, iterations: int = ITERATIONS) -> Tensor:
    """Return a with G^T G a = 1 / a; [..., N], float64.

    An expert whose domain vector is 0, or not finite, has nothing to bargain for: its weight is 0, and it does not
    count for the others.

    Args:
        gram: G^T G; [..., N, N], any number of problems at once.
        start: the solution of a similar problem, where Newton's method then begins if that is nearer; [..., N]. Entries
            that are not positive and finite are ignored.
        iterations: Newton steps; all are taken, and more than needed change nothing beyond rounding.
    """
    gram = gram.double()
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()  # |tau_i| [..., N]
    there = (lengths > 0) & gram.isfinite().all(-1)
    scale = torch.where(there, lengths, 1).reciprocal()
    k = gram * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    # who is not there becomes a player without relations, whose share of 1 is dropped in the end
    both = there.unsqueeze(-1) & there.unsqueeze(-2)
    eye = torch.eye(gram.shape[-1], dtype=k.dtype, device=k.device)
    k = _definite(torch.where(both, k, eye), eye)
    b = _scaled(torch.ones_like(lengths), k)
    if start is not None:
        b = _better(b, start.double() / scale, k)
    for _ in range(iterations):
        b = _newton(b, k)
    b = b * (LARGEST / b.amax(-1, keepdim=True)).clamp_max(1)
    return torch.where(there, b * scale, 0)


def _definite(k: Tensor, eye: Tensor) -> Tensor:
    """Lift K, whose products were rounded, until it is positive definite."""
    lowest = torch.linalg.eigvalsh(k)[..., :1].unsqueeze(-1)  # [..., 1, 1]
    return k + eye * ((-lowest).clamp_min(0) + RIDGE)


def _value(b: Tensor, k: Tensor) -> Tensor:
    return 0.5 * torch.einsum("...i,...ij,...j->...", b, k, b) - b.log().sum(-1)


def _scaled(b: Tensor, k: Tensor) -> Tensor:
    """Return b times the number that makes f least: b^T K b = N."""
    quadratic = torch.einsum("...i,...ij,...j->...", b, k, b)
    return b * (b.shape[-1] / quadratic).sqrt().unsqueeze(-1)


def _better(b: Tensor, other: Tensor, k: Tensor) -> Tensor:
    """Return whichever has the smaller f; `other` may hold anything."""
    usable = (other.isfinite() & (other > 0)).all(-1)
    other = _scaled(torch.where(usable.unsqueeze(-1), other, b), k)
    return torch.where((_value(other, k) < _value(b, k)).unsqueeze(-1), other, b)


def _newton(b: Tensor, k: Tensor) -> Tensor:
    """Take one damped Newton step; in u = step / b, so that a b that is large in places does no harm."""
    gradient = b * (k @ b.unsqueeze(-1)).squeeze(-1) - 1  # b_i (K b)_i - 1
    hessian = b.unsqueeze(-1) * k * b.unsqueeze(-2)
    hessian = hessian + torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
    u = -torch.linalg.solve_ex(hessian, gradient.unsqueeze(-1))[0].squeeze(-1)
    decrement = (-(u * gradient).sum(-1, keepdim=True)).clamp_min(0).sqrt()
    # a full step is safe, and converges quadratically, once the decrement is small
    return b * (1 + u * torch.where(decrement < 0.25, 1.0, 1 / (1 + decrement)))
