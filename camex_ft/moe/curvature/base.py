"""Interface of a kind of curvature: tensors [R, N, ...] that map domain vectors, and their gradients back.

A kind is one file with two named tuples, one for a matrix (`Factors`) and one for its bias (`BiasFactors`), and a row
in `curvature.KINDS`. Their fields are the names of the parameters, and experts are on axis 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

# elements that are worked on together: experts of small maps, rows of a large one
BLOCK_ELEMENTS = {"cpu": 9 << 15, "cuda": 1 << 28}

Shapes = dict[str, tuple[int, ...]]


class Factors(Protocol):
    """The factors of one matrix's curvature, for all R terms and N experts: a named tuple of tensors [R, N, ...]."""

    @classmethod
    def shapes(cls, *, out: int, width: int, experts: int, rank: int) -> Shapes:
        """Return the shape of each factor for maps [out, width]."""

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Factors:
        """Return the factors again from their tensors, in order."""

    def __iter__(self) -> Iterator[Tensor]: ...

    @property
    def rank(self) -> int:
        """R, the number of terms."""

    @property
    def cost(self) -> int:
        """Multiply-adds of `curve` for each term and entry of a domain vector."""

    def reset(self) -> None:
        """Make M_i the identity, with terms that come to differ in training; in place."""

    def curve(
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
            active: experts to take; the result of the others is not set. None takes all.
            out: memory for the result.
        """

    def curve_backward(
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
            grad: dT, contiguous; [N, out, in]. Experts that are not active are left as they are.
            experts, base, active: as `curve` had them.
            learn: whether the factors' gradients are wanted.
            domain: whether dtau is wanted; dT stays otherwise.
            out: memory for T, which is then made on the way; [N, out, in].
        """

    def curve_pair(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
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
        """Return the condition number of M_i per expert, [N] in float64, or None where it does not follow cheaply."""


class BiasFactors(Protocol):
    """The factors of one bias's curvature: a named tuple of tensors [R, N, ...]."""

    @classmethod
    def shapes(cls, *, out: int, experts: int, rank: int) -> Shapes:
        """Return the shape of each factor for biases [out]."""

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> BiasFactors:
        """Return the factors again from their tensors, in order."""

    def reset(self) -> None:
        """Make the map the identity, with terms that come to differ in training; in place."""

    def curve(self, tau: Tensor) -> Tensor:
        """Return the curved domain vectors of the bias, with a graph; [N, out]."""


def chunks(experts: Tensor, active: Sequence[int] | None) -> Iterator[slice]:
    """Yield chunks of neighbouring experts, of all or of the active ones."""
    count = experts.shape[0]
    size = max(1, min(count, block_elements(experts) // experts[0].numel()))
    if active is None:
        yield from (slice(start, min(start + size, count)) for start in range(0, count, size))
    else:
        yield from (slice(i, i + 1) for i in active)


def block_elements(tensor: Tensor) -> int:
    """Return how many elements are worked on together on this device."""
    return BLOCK_ELEMENTS.get(tensor.device.type, BLOCK_ELEMENTS["cuda"])
