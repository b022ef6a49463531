"""Interface of a kind of curvature: tensors [R, N, ...] that transform domain vectors, and their gradients.

A kind is one file with a `Curvature` module and two named tuples, one for a matrix (`Factors`) and one for its bias
(`BiasFactors`), and a row in `curvature.KINDS`. The tuples' fields are the names of the module's parameters, and
experts are on axis 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

Shapes = dict[str, tuple[int, ...]]


class Factors(Protocol):
    """Factors of one matrix's curvature for all R terms and N experts: a named tuple of tensors [R, N, ...]."""

    @classmethod
    def shapes(cls, *, out: int, width: int, experts: int, rank: int) -> Shapes:
        """Return the shape of each factor for maps [out, width]."""

    def __iter__(self) -> Iterator[Tensor]: ...

    @property
    def rank(self) -> int:
        """R, the number of terms."""

    @property
    def cost(self) -> int:
        """Multiply-adds of `transform` for each term and entry of a domain vector."""

    def reset(self) -> None:
        """Make M_i the identity, with terms that come to differ in training; in place."""

    def transform(
        self,
        experts: Tensor,
        base: Tensor | None,
        active: Sequence[int] | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return M_i (E_i - E_m), or M_i E_i without a base; [N, out, in]. No gradient.

        Args:
            experts: [N, out, in].
            base: [out, in] or None.
            active: experts to transform; the result of the others is not set. None transforms all.
            out: memory for the result.
        """

    def transform_backward(
        self,
        grad: Tensor,
        experts: Tensor,
        base: Tensor | None,
        active: Sequence[int] | None = None,
        *,
        learn: bool,
        domain: bool = True,
        out: Tensor | None = None,
    ) -> Factors | None:
        """Turn dT into dtau = M_i^T dT, in place, and return the gradients of the factors if they `learn`.

        Args:
            grad: dT, contiguous; [N, out, in]. Experts that are not active stay unchanged.
            experts, base, active: as in `transform`.
            learn: compute the factors' gradients.
            domain: compute dtau; `grad` stays dT otherwise.
            out: memory for T, which is then recomputed along the way; [N, out, in].
        """

    def transform_pair(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return B' and A' with M_i (B_i A_i) = B'_i A'_i, with a graph, and without a matrix [out, in].

        Args:
            left: B; [N, out, r].
            right: A; [N, r, in].

        Returns:
            [N, out, r'] and [N, r', in], with r' = r or R r.
        """

    def distance(self) -> Tensor:
        """Return ||M_i - I||_F / ||I||_F per expert, without a large matrix; [N], float64."""

    def condition(self) -> Tensor | None:
        """Return the condition number of M_i per expert, [N] in float64, or None if it does not follow cheaply."""


class BiasFactors(Protocol):
    """Factors of one bias's curvature: a named tuple of tensors [R, N, ...]."""

    @classmethod
    def shapes(cls, *, out: int, experts: int, rank: int) -> Shapes:
        """Return the shape of each factor for biases [out]."""

    def reset(self) -> None:
        """Make the map the identity, with terms that come to differ in training; in place."""

    def transform(self, tau: Tensor) -> Tensor:
        """Return the transformed domain vectors of the bias, with a graph; [N, out]."""


class Curvature(nn.Module):
    """Curvature of one linear map's experts; the identity at initialisation for every kind and rank.

    The parameters' names are the fields of the kind's factors; all have the experts on axis 1.

    Args:
        out_features, in_features: shape of the map.
        experts: N.
        rank: R, the number of terms.
        bias: create factors for the bias as well.
    """

    kind: ClassVar[str]
    weight_type: ClassVar[Any]  # a `Factors`
    bias_type: ClassVar[Any]  # a `BiasFactors`

    def __init__(self, *, out_features: int, in_features: int, experts: int, rank: int, bias: bool) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"curvature rank is {rank}: expected at least 1")
        weight = self.weight_type.shapes(out=out_features, width=in_features, experts=experts, rank=rank)
        for name, shape in weight.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        bias_shapes = self.bias_type.shapes(out=out_features, experts=experts, rank=rank)
        for name, shape in bias_shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)) if bias else None)
        self.names, self.bias_names = tuple(weight), tuple(bias_shapes) if bias else ()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make the map the identity, with terms that come to differ in training; nothing on the meta device."""
        if self.get_parameter(self.names[0]).is_meta:
            return
        self.factors.reset()
        if self.bias_factors is not None:
            self.bias_factors.reset()

    @property
    def factors(self) -> Factors:
        """The weight's factors."""
        raise NotImplementedError

    @property
    def bias_factors(self) -> BiasFactors | None:
        """The bias's factors, or None without a bias."""
        if not self.bias_names:
            return None
        factors: BiasFactors = self.bias_type._make(getattr(self, name) for name in self.bias_names)
        return factors

    def transform_bias(self, tau: Tensor) -> Tensor:
        """Return the transformed domain vectors of the bias; [N, out]."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the kind and the rank."""
        return f"kind={self.kind}, rank={self.factors.rank}"
