"""`namex-full`: the base expert is propagated along a Nash bargain among the domain vectors of every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Lt

from camex_ft.protocols import dynamic

if TYPE_CHECKING:
    from camex_ft.moe.merging.base_expert import LayerVectors, PropagatedBase


@dynamic(
    "namex-full",
    summary="dynamic merging: the base expert is propagated along a Nash bargain, solved at every layer",
    source="NAMEx, arXiv 2510.16138; complex momentum: Lorraine et al. 2022 (arXiv 2102.08431)",
)
def namex_full(
    base: PropagatedBase,
    *,
    vectors: LayerVectors,
    gamma: Annotated[float, Ge(0)] = 1.0,
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0,
    angle: float = 0.0,
) -> PropagatedBase:
    """At every layer:  a solves G^T G a = 1/a with G = [tau_1 ... tau_N];  delta = sum_i a_i tau_i;
    mu <- beta mu + delta with beta = momentum * e^(i angle), mu = 0 before the first layer;
    E_m of the next layer = E_m + Re(gamma mu), and every layer merges as `domain-ca` does.

    Convention: an expert bargains with all its matrices and biases together, so that they share a; over the domain
    vectors themselves, whose curvature enters the merging alone. a is solved for, not learned: no gradient flows
    through it. An expert without a domain vector takes no part.

    Args:
        base: E_m and mu of this layer.
        vectors: the domain vectors of this layer.
        gamma: step size from layer to layer. The step itself has length sqrt(N), however long the domain vectors are.
        momentum: |beta|; 0 has no momentum.
        angle: of beta, in radians. Its sign makes no difference: Re(mu) is even in it where gamma is real.
    """
    from camex_ft.moe.merging.base_expert import descend

    a = vectors.bargain()
    delta = vectors.sum(a)
    return descend(base, delta, gamma=gamma, momentum=momentum, angle=angle)
