"""`namex`: the base expert is propagated along a Nash bargain among the domain vectors of the first layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Lt

from camex_ft.protocols import dynamic

if TYPE_CHECKING:
    from camex_ft.moe.merging.base_expert import LayerVectors, PropagatedBase


@dynamic(
    "namex",
    summary="dynamic merging: the base expert is propagated along a Nash bargain, solved at the first layer",
    source="NAMEx, arXiv 2510.16138; complex momentum: Lorraine et al. 2022 (arXiv 2102.08431)",
)
def namex(
    base: PropagatedBase,
    *,
    vectors: LayerVectors,
    gamma: Annotated[float, Ge(0)] = 1.0,
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0,
    angle: float = 0.0,
) -> PropagatedBase:
    """At the first layer:  a solves G^T G a = 1/a with G = [tau_1 ... tau_N];  b_i = a_i |tau_i|;
    at every layer:  a_i = b_i / |tau_i|;  delta = sum_i a_i tau_i;
    mu <- beta mu + delta with beta = momentum * e^(i angle), mu = 0 before the first layer;
    E_m of the next layer = E_m + Re(gamma mu), and every layer merges as `domain-ca` does.

    Convention: as `namex-full`, which solves at every layer. Later layers reuse the shares b, which do not depend
    on the length of the domain vectors: a itself is large where they are short, as they are in the first layer when
    training starts, and would throw the base expert far away where they are long. Without domain vectors in the first
    layer, as before training, b is 0 and the base expert stays the same from layer to layer.

    Args:
        base: E_m and mu of this layer, and b of the first.
        vectors: the domain vectors of this layer.
        gamma: step size from layer to layer. The step itself has length sqrt(N) at the first layer.
        momentum: |beta|; 0 has no momentum.
        angle: of beta, in radians. Its sign makes no difference: Re(mu) is even in it where gamma is real.
    """
    import torch

    from camex_ft.moe.merging.base_expert import descend

    lengths = vectors.lengths()
    b = vectors.bargain() * lengths if base.shares is None else base.shares
    a = torch.where(lengths > 0, b / lengths, 0)
    delta = vectors.sum(a)
    return descend(base._replace(shares=b), delta, gamma=gamma, momentum=momentum, angle=angle)
