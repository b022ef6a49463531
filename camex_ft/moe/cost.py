"""Which exact form of the merged map is cheaper: a cost model fitted to measured times.

A form's time is a sum of counts, each times a measured rate (`Rates`, nanoseconds):

    merge   products G L out in, slices of E_hat G out in, sums over experts G N out in, domain vectors N out in
    mix     products (1 + k) G L out in, domain vectors N out in

    curvature, in either form: R N out in (a1 + a2 + c1 + c2), and N out in

The rates are constants of the package and not taken on the user's machine: a choice that varied from run to run would
change the rounding, and with it the bits, of a run that is repeated or resumed. Only their ratios decide.
Where they come from and how well they predict: docs/cost.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Form = Literal["merge", "mix"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the cost of one call depends on: G groups of L tokens, the map, N experts of which a group uses k."""

    groups: int
    length: int
    out: int
    width: int
    experts: int
    used: float
    rank: int = 0
    factors: int = 0  # a1 + a2 + c1 + c2
    bytes_: int = 4


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Nanoseconds a count, forward and backward together, in float32 on one kind of device."""

    dense: float
    merge_product: float
    merge_slice: float
    merge_sum: float
    merge_vector: float
    mix_product: float
    mix_row: float
    mix_vector: float
    curvature: float
    curved_vector: float


# 2 cores (AVX-512), 2 threads; fitted by `camex-ft bench cost`, results/bench/cost-cpu.json
CPU = Rates(
    dense=0.04,
    merge_product=0.04,
    merge_slice=1.0,
    merge_sum=0.07,
    merge_vector=2.0,
    mix_product=0.045,
    mix_row=0.0,
    mix_vector=2.0,
    curvature=0.06,
    curved_vector=3.0,
)


def merge_ns(shape: Shape, rates: Rates = CPU) -> float:
    """Return the predicted time of merging, forward and backward; ns."""
    area = shape.out * shape.width
    return area * (
        shape.groups * shape.length * rates.merge_product
        + shape.groups * rates.merge_slice
        + shape.groups * shape.experts * rates.merge_sum
        + shape.experts * rates.merge_vector
    )


def mix_ns(shape: Shape, rates: Rates = CPU) -> float:
    """Return the predicted time of mixing, forward and backward; ns."""
    area = shape.out * shape.width
    rows = shape.groups * shape.length
    return area * ((1 + shape.used) * (rows * rates.mix_product) + shape.experts * rates.mix_vector)


def curves_once(shape: Shape) -> bool:
    """Return whether the backward pass should make T while it takes dT back, and so v1 to v3 once (`kronecker`).

    H is then made twice: first for dT, without T, and again for ds.
    """
    saved = shape.rank * shape.experts * shape.factors
    return saved > 2 * shape.groups * (shape.length + 16)


def cheaper(shape: Shape) -> Form:
    """Return the form that is predicted to be faster."""
    return "mix" if mix_ns(shape) < merge_ns(shape) else "merge"
