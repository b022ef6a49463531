"""Cost model of the merged map: it chooses the cheaper of the exact forms, and is fitted to measured times.

The time of one call, forward and backward, is a sum of counts, each times a rate in nanoseconds (`RATES`); with
area = out in:

    merge     token   G L area         products with x and dy
              slice   G area           E_hat and H, made and read once for each group
              sum     G N area         sums over the experts
              vector  N area           experts, T and its gradient, read and written
    mix       token   (1 + k) G L area
              vector  N area
    curve     factor  R N area (a1 + a2 + c1 + c2)        beside either form
              vector  N area

The rate of curvature is that of Kronecker products. Curvature costs the same beside either form, so that it decides
`curves_once` alone, which gains nothing where curvature is as cheap as that of the other kinds.

The rates are constants of the package and not taken on the user's machine: a choice that varied from run to run would
change the rounding, and with it the bits, of a run that is repeated or resumed. Only their ratios decide.
`camex-ft bench cost` measures and fits them; how well they predict is in docs/cost.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Form = Literal["merge", "mix"]
Part = Literal["merge", "mix", "curve"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes that the cost of one call depends on.

    Attributes:
        groups, length: G groups of L tokens.
        out, width: of the map.
        experts, used: N, and how many a group uses on average.
        rank, factors: R of the curvature and the multiply-adds of each term and entry, a1 + a2 + c1 + c2 for Kronecker
            products (`base.Factors.cost`); 0 without.
    """

    groups: int
    length: int
    out: int
    width: int
    experts: int
    used: float
    rank: int = 0
    factors: int = 0


# ns a count; 2 cores with AVX-512, float32: results/bench/cost-768x3072-float32-cpu.json
RATES: Mapping[Part, Mapping[str, float]] = {
    "merge": {"token": 0.04572, "slice": 1.04, "sum": 0.01771, "vector": 4.012},
    "mix": {"token": 0.03732, "vector": 3.277},
    "curve": {"factor": 0.1135, "vector": 0.0},
}


def counts(part: Part, shape: Shape) -> dict[str, float]:
    """Return the counts that the time of one part is made of."""
    area = shape.out * shape.width
    tokens = shape.groups * shape.length * area
    vectors = shape.experts * area
    if part == "merge":
        return {
            "token": tokens,
            "slice": shape.groups * area,
            "sum": shape.groups * vectors,
            "vector": vectors,
        }
    if part == "mix":
        return {"token": (1 + shape.used) * tokens, "vector": vectors}
    return {"factor": shape.rank * vectors * shape.factors, "vector": vectors if shape.rank else 0}


def predict(form: Form, shape: Shape, rates: Mapping[Part, Mapping[str, float]] = RATES) -> float:
    """Return the predicted time of a forward and a backward pass, in seconds on the machine of the rates."""
    total = 0.0
    parts: tuple[Part, ...] = (form, "curve")
    for part in parts:
        total += sum(rates[part][name] * count for name, count in counts(part, shape).items())
    return total * 1e-9


def cheaper(shape: Shape) -> Form:
    """Return the form that is predicted to be faster."""
    return "mix" if predict("mix", shape) < predict("merge", shape) else "merge"


def curves_once(shape: Shape) -> bool:
    """Return whether the backward pass should make T while it takes dT back, and so v1 to v3 once (`kronecker`).

    H is then made twice: first for dT, without T, and again for ds.
    """
    merge, curve = counts("merge", shape), counts("curve", shape)
    saved = RATES["curve"]["factor"] * curve["factor"] / 7  # 3 of about 20 products
    return saved > RATES["merge"]["token"] * merge["token"] / 3 + RATES["merge"]["slice"] * merge["slice"] / 4
