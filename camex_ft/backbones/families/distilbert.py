"""DistilBERT: one bidirectional stack, FFN `ffn` of `lin1` and `lin2`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from camex_ft.backbones.base import DenseFFN, register
from camex_ft.backbones.layouts import encoder_stack, find, linear, one_stack, refuse_chunking

if TYPE_CHECKING:
    from torch import nn


@register(
    "distilbert",
    model_types=("distilbert",),
    masks=one_stack(encoder_stack),
    attention=("q_lin", "v_lin"),
)
def ffns(model: nn.Module) -> list[DenseFFN]:
    """DistilBERT: encoder."""
    refuse_chunking(model)
    return [
        DenseFFN(
            path=path,
            stack=encoder_stack(model),
            layer=layer,
            weights={"up": linear(ffn.lin1), "down": linear(ffn.lin2)},
            activation=ffn.activation,
            outer_dropout=ffn.dropout.p,
        )
        for layer, (path, ffn) in enumerate(find(model, "lin1", "lin2", "activation", "dropout"))
    ]
