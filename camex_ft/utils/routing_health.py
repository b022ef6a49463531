"""Warnings about routing that leaves experts without a purpose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

FLAT = 0.995  # share of the largest entropy from which on routing weights are as good as uniform
ALL = 0.98  # share of inputs from which on one expert is as good as all there is,
SHARP = 0.8  # if the entropy is below this share of the largest: close weights share the inputs, whichever is ahead


def routing_warnings(
    entropies: Mapping[str, float | None], loads: Mapping[str, Sequence[float | None]]
) -> list[str]:
    """Return a warning for flat routing and one for an expert that wins everything, with what to do; often none.

    Args:
        entropies: mean entropy of a layer's routing weights, in nats, by layer.
        loads: share of the inputs whose largest routing weight is each expert's, [N], by layer.
    """
    share = {
        name: (entropies.get(name) or 0.0) / math.log(len(load))
        for name, load in loads.items()
        if len(load) > 1
    }
    flat = [name for name in share if share[name] >= FLAT]
    won = [name for name in share if share[name] < SHARP and max(part or 0.0 for part in loads[name]) >= ALL]
    warnings = []
    if flat:
        warnings.append(
            f"routing is flat in {_layers(flat, loads)}: every input gives every expert the same weight, so that they "
            "act as one. Start them apart (upcycle.init: noise, or checkpoints with routing.init: fit), or raise "
            "training.router_learning_rate"
        )
    if won:
        warnings.append(
            f"one expert serves almost every input in {_layers(won, loads)}: raise routing.balance, leave "
            "routing.noise on, or lower training.router_learning_rate"
        )
    return warnings


def _layers(names: Sequence[str], all_layers: Mapping[str, object]) -> str:
    if len(names) == len(all_layers) > 1:
        return f"all {len(names)} layers"
    return f"{names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
