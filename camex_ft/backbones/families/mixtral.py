"""Mixtral: Mistral with a sparse mixture in every block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from camex_ft.backbones.base import MixtureRouting, SparseFFN, register
from camex_ft.backbones.layouts import causal_stack, mixture_ffns, number, one_stack

if TYPE_CHECKING:
    from torch import nn


def routing(config: Any) -> MixtureRouting:
    """Return the routing: softmax over all, of which the k largest are scaled to sum to 1, as if over them alone."""
    return MixtureRouting(
        experts=number(config, "num_local_experts", default=8),
        top_k=number(config, "num_experts_per_tok", default=2),
        normalise="after",
    )


@register(
    "mixtral",
    model_types=("mixtral",),
    masks=one_stack(causal_stack),
    attention=("q_proj", "v_proj"),
    routing=routing,
)
def ffns(model: nn.Module) -> list[SparseFFN]:
    """Mixtral: decoder of sparse mixtures."""
    return mixture_ffns(model, routing(model.config))
