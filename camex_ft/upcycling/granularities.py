"""Granularity of a stack: the one that `auto` stands for, and those that cannot be."""

from __future__ import annotations

from typing import cast

from transformers import PreTrainedModel

from camex_ft.backbones import generates
from camex_ft.config import RoutingConfig
from camex_ft.moe.routing.grouping import Granularity
from camex_ft.protocols import Protocol
from camex_ft.utils.errors import UserError

CAUSAL = "causal"  # in a config's entry: routing is that of a language model, whatever the head


def granularity_of(
    protocol: Protocol, routing: RoutingConfig, *, stack: str, model: PreTrainedModel
) -> Granularity:
    """Return the granularity of one stack's layers, with `auto` decided.

    What was trained as a language model is routed as one under another head too, as its config's entry says then.

    Raises:
        UserError: the protocol does not allow it, or it would let a token that generates see its future.
    """
    said = getattr(model.config, "camex", None) or {}
    causal = stack == "decoder" and (generates(model) or bool(said.get(CAUSAL)))
    both = getattr(model.config, "is_encoder_decoder", False)
    _check_choice(protocol, routing, causal=causal, model=model)
    wanted: str = routing.granularity
    if wanted == "encoder" and not both:
        raise UserError(
            f"routing.granularity: encoder needs a backbone with an encoder and a decoder; {_name(model)} has one stack"
        )
    if wanted in ("auto", "encoder"):
        if "sequence" not in protocol.granularities:
            wanted = protocol.granularities[0]
        elif stack == "decoder" and both and (causal or wanted == "encoder"):
            wanted = "encoder"
        else:
            wanted = "segment" if causal else "sequence"
    if wanted not in protocol.granularities:
        raise UserError(
            f"routing.granularity: {protocol.name} does not allow {wanted}; "
            f"it allows {', '.join(protocol.granularities)}"
        )
    if wanted == "sequence" and causal:
        raise UserError(
            f"routing.granularity: sequence would let tokens of {_name(model)}, which generates, be routed by their "
            "future; use auto, segment or token"
        )
    return cast(Granularity, wanted)


def _check_choice(
    protocol: Protocol, routing: RoutingConfig, *, causal: bool, model: PreTrainedModel
) -> None:
    if routing.router != "expert-choice":
        return
    if protocol.form != "outputs":
        raise UserError(
            f"routing.router: expert-choice lets experts take tokens, and {protocol.name} merges weights: use it with "
            "smoe, or linear or cosine"
        )
    if causal:
        raise UserError(
            f"routing.router: expert-choice would let tokens of {_name(model)}, which generates, be routed by their "
            "future: an expert takes the best tokens of a whole sequence; use linear or cosine"
        )


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__
