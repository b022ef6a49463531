"""`ep-camex`: the base expert is propagated along the mean of the transformed domain vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from camex_ft.protocols import dynamic

if TYPE_CHECKING:
    from torch import Tensor

    from camex_ft.moe.merging.base_expert import PropagatedBase


@dynamic(
    "ep-camex",
    summary="dynamic merging: the base expert is propagated along the mean of the transformed domain vectors",
    source="CAMEx (arXiv 2502.18821, section 3.3)",
)
def ep_camex(base: PropagatedBase, *, mean: Tensor, gamma: Annotated[float, Ge(0)] = 1.0) -> PropagatedBase:
    """E_m of layer l + 1 = E_m^l + gamma/N * sum_i M_i tau_i^l, and every layer merges as `domain-ca` does.

    Convention: the first upcycled layer of a stack stores E_m, encoder and decoder apart. The sum is over all experts,
    routed to or not, and over the whole domain vectors. Weights and biases are propagated alike.

    Args:
        base: E_m of this layer.
        mean: 1/N sum_i M_i tau_i; as E_m.
        gamma: step size from layer to layer; 0 shares one base expert among the layers of a stack.
    """
    return base._replace(base=base.base + gamma * mean)
