"""OLMoE: a sparse mixture in every block, whose routing weights sum to less than 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from camex_ft.backbones.base import MixtureRouting, SparseFFN, register
from camex_ft.backbones.layouts import causal_stack, mixture_ffns, number, one_stack

if TYPE_CHECKING:
    from torch import nn


def routing(config: Any) -> MixtureRouting:
    """Return the routing: softmax over all, of which the k largest are scaled to sum to 1 with `norm_topk_prob`."""
    return MixtureRouting(
        experts=number(config, "num_experts", "num_local_experts", default=64),
        top_k=number(config, "num_experts_per_tok", default=8),
        normalise="after" if getattr(config, "norm_topk_prob", False) else "before",
    )


@register(
    "olmoe",
    model_types=("olmoe",),
    masks=one_stack(causal_stack),
    attention=("q_proj", "v_proj"),
    routing=routing,
)
def ffns(model: nn.Module) -> list[SparseFFN]:
    """OLMoE: decoder of sparse mixtures."""
    return mixture_ffns(model, routing(model.config))
