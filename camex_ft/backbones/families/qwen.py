"""Qwen2, Qwen2.5, Qwen3: Llama's layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from camex_ft.backbones.base import DenseFFN, register
from camex_ft.backbones.layouts import causal_stack, gated_mlp_ffns, one_stack

if TYPE_CHECKING:
    from torch import nn


@register(
    "qwen", model_types=("qwen2", "qwen3"), masks=one_stack(causal_stack), attention=("q_proj", "v_proj")
)
def ffns(model: nn.Module) -> list[DenseFFN]:
    """Qwen2, Qwen2.5, Qwen3: decoder."""
    return gated_mlp_ffns(model)
