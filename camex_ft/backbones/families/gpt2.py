"""GPT-2: one causal stack, FFN `mlp` of two `Conv1D`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from camex_ft.backbones.base import DenseFFN, register
from camex_ft.backbones.layouts import causal_stack, conv1d, find, one_stack

if TYPE_CHECKING:
    from torch import nn


@register("gpt2", model_types=("gpt2",), masks=one_stack(causal_stack), attention=("c_attn",))
def ffns(model: nn.Module) -> list[DenseFFN]:
    """GPT-2: decoder."""
    return [
        DenseFFN(
            path=path,
            stack=causal_stack(model),
            layer=layer,
            weights={"up": conv1d(mlp.c_fc), "down": conv1d(mlp.c_proj)},
            activation=mlp.act,
            outer_dropout=mlp.dropout.p,
        )
        for layer, (path, mlp) in enumerate(find(model, "c_fc", "c_proj", "act", "dropout"))
    ]
