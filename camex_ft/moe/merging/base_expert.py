"""Base experts in dynamic merging, where they are propagated from layer to layer of a stack.

    E_m of layer 1        a parameter
    E_m of layer l + 1    = step(E_m of layer l, domain vectors of layer l)        the protocol's step

Only the first layer stores a base expert. A propagated one does not depend on the input, but it is computed in every
forward pass, layer by layer, so that gradients flow back through it; in a scope in which parameters are declared
unchanged it is cached. A layer whose matrices have other shapes than those of the layer before it stores one again.
Source: CAMEx (arXiv 2502.18821, section 3.3); NAMEx (arXiv 2510.16138).
"""

from __future__ import annotations

import cmath
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from camex_ft.moe.merging.domain_vectors import slices
from camex_ft.moe.merging.functional import traced
from camex_ft.moe.workspace import workspace


class PropagatedBase(NamedTuple):
    """Propagated base expert of one weight or bias, with its momentum.

    Attributes:
        base: E_m; [...], as one expert's weight [out, in] or bias [out].
        momentum: mu, real or complex, or None before it is needed; as `base`.
        shares: a_i |tau_i| of the first layer, where the protocol reuses them; [N], or None.
    """

    base: Tensor
    momentum: Tensor | None = None
    shares: Tensor | None = None


class BaseExperts(NamedTuple):
    """Base expert of one map, stored or propagated.

    Attributes:
        weight, bias: None where the protocol has no base expert, or the map no bias.
    """

    weight: PropagatedBase | None
    bias: PropagatedBase | None


class Means(NamedTuple):
    """Means over the experts of M_i tau_i: of the weight [out, in], and of the bias [out] or None."""

    weight: Tensor
    bias: Tensor | None


class LayerVectors:
    """The domain vectors of one weight or bias, as a protocol's step may use them.

    An expert's domain vector as a whole is that of all its matrices and biases in the layer.

    Args:
        experts: E_i; [N, ...].
        base: E_m of the layer; [...].
        gram: computes the Gram matrix of the layer's whole domain vectors; [N, N].
        bargain: computes Nash weights from it; [N]; see `nash`.
    """

    def __init__(
        self, experts: Tensor, base: Tensor, gram: Callable[[], Tensor], bargain: Callable[[], Tensor]
    ) -> None:
        self.experts, self.base, self.gram, self.bargain = experts, base, gram, bargain

    def lengths(self) -> Tensor:
        """Return |tau_i| of the whole domain vectors; [N], float64."""
        return self.gram().diagonal().clamp_min(0).sqrt()

    def sum(self, a: Tensor) -> Tensor:
        """Return sum_i a_i tau_i for weights a [N], which have no gradient; [...]."""
        if traced():
            return torch.einsum("n,n...->...", a.to(self.experts.dtype), self.experts - self.base)
        total: Tensor = WeightedSum.apply(self.experts, self.base, a)
        return total


# PropagatedBase and, by name, `mean` or `vectors`, as the protocol takes them -> PropagatedBase of the next layer
Step = Callable[..., PropagatedBase]


def descend(
    base: PropagatedBase, delta: Tensor, *, gamma: float, momentum: float, angle: float
) -> PropagatedBase:
    """Take a step with momentum: mu <- beta mu + delta;  E_m <- E_m + Re(gamma mu);  beta = momentum e^(i angle).

    Args:
        base: E_m, and mu or None for 0.
        delta: as E_m.
        gamma: size of the step, a real number.
        momentum, angle: of beta, the angle in radians. With angle 0 all is real; -angle gives the same E_m as angle,
            since mu is then the complex conjugate.
    """
    if momentum == 0:
        return base._replace(base=base.base + gamma * delta)
    mu = delta if angle == 0 else delta.to(torch.promote_types(delta.dtype, torch.complex64))
    if base.momentum is not None:
        beta = cmath.rect(momentum, angle)
        mu = (momentum if angle == 0 else beta) * base.momentum + mu
    moved = mu.real if mu.is_complex() else mu
    return base._replace(base=base.base + (gamma * moved).to(delta.dtype), momentum=mu)


class WeightedSum(torch.autograd.Function):
    """sum_i a_i (E_i - E_m); only a is saved for the backward pass."""

    @staticmethod
    def forward(ctx: Any, experts: Tensor, base: Tensor, a: Tensor) -> Tensor:
        a = a.to(experts.device, torch.promote_types(experts.dtype, torch.float32))
        ctx.save_for_backward(a)
        ctx.dtype = experts.dtype
        total = torch.zeros_like(base, dtype=a.dtype)
        # tau first: a is as large as tau is small, and rounding of a_i E_i would lose it
        for rows in slices(_matrices(experts)):
            tau = _tau(experts, base, rows)
            total.view(-1, base.shape[-1])[rows] += torch.einsum("n,n...->...", a, tau.to(a.dtype))
        return total.to(experts.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (a,) = ctx.saved_tensors
        grad, (experts, base, _) = grad.to(a.dtype), ctx.needs_input_grad
        # no matrix product, which the caller's autocast would round
        back = (a.view(-1, *[1] * grad.dim()) * grad).to(ctx.dtype) if experts else None
        return back, (-a.sum() * grad).to(ctx.dtype) if base else None, None


@torch.no_grad()
def gram_matrix(experts: Tensor, base: Tensor) -> Tensor:
    """Return <tau_i, tau_j>; [N, N], float64, in one pass over the domain vectors.

    Args:
        experts: [N, out, in] or [N, out].
        base: [out, in] or [out].
    """
    if traced():
        tau = (experts - base).flatten(1)
        tau = tau.to(torch.promote_types(tau.dtype, torch.float32))
        return (tau @ tau.mT).double()
    count = experts.shape[0]
    total = torch.zeros(count, count, dtype=torch.float64, device=experts.device)
    for rows in slices(_matrices(experts)):
        tau = _tau(experts, base, rows).flatten(1)
        tau = tau.to(torch.promote_types(tau.dtype, torch.float32))
        total += (tau @ tau.mT).double()
    return total


def _matrices(tensor: Tensor) -> Tensor:
    """View biases [N, out] as [N, 1, out]; weights stay."""
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor


def _tau(experts: Tensor, base: Tensor, rows: slice) -> Tensor:
    """Return rows of the domain vectors; [N, rows, in]."""
    some = _matrices(experts)[:, rows]
    return torch.sub(some, base.view(-1, base.shape[-1])[rows], out=workspace("tau", tuple(some.shape), some))
