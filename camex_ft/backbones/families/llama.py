"""Llama (and the models published under its type, such as SmolLM2): one causal stack, gated FFN `mlp`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from camex_ft.backbones.base import DenseFFN, register
from camex_ft.backbones.layouts import causal_stack, gated_mlp_ffns, one_stack

if TYPE_CHECKING:
    from torch import nn


@register("llama", model_types=("llama",), masks=one_stack(causal_stack), attention=("q_proj", "v_proj"))
def ffns(model: nn.Module) -> list[DenseFFN]:
    """Llama: decoder."""
    return gated_mlp_ffns(model)
