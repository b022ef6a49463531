"""Settings under which an upcycled model does not compute what its dense model computed, with the reasons."""

from __future__ import annotations

from camex_ft.config.schema import MergingConfig, RoutingConfig, UpcycleConfig
from camex_ft.utils.registry import PROTOCOLS

START = "so that training starts from a changed function"


def changes(merging: MergingConfig, routing: RoutingConfig, upcycle: UpcycleConfig) -> list[str]:
    """Return the reasons, one sentence each, for sections with every default settled; none: the function is preserved.

    `init: noise` is not among them: how far it moves the experts is what its key says.
    """
    protocol = PROTOCOLS.get(merging.protocol)
    found: list[str] = []
    if protocol.form == "dense":
        return found
    if protocol.form == "dynamic" and merging.alpha != 1:
        found.append(
            f"merging.alpha: {protocol.name} carries the base expert from other layers, and E_m + alpha * (E_i - E_m) "
            f"is E_i at alpha = 1 alone; with {merging.alpha:g} every layer but the first is mixed with another "
            f"layer's weights, {START}"
        )
    scaled = protocol.form != "weights" or not protocol.base
    if routing.normalise == "before" and merging.k < merging.experts and scaled:
        found.append(
            f"routing.normalise: before leaves routing weights of less than 1 in all to the {merging.k} of "
            f"{merging.experts} experts, and {protocol.name} scales with them, {START}"
        )
    if upcycle.init == "drop" and upcycle.drop > 0:
        found.append(f"upcycle.init: drop draws {upcycle.drop:.0%} of each expert's units anew, {START}")
    return found
