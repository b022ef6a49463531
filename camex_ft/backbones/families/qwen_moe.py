"""Qwen2-MoE (Qwen1.5-MoE) and Qwen3-MoE: sparse mixtures, beside a gated shared expert in the first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from camex_ft.backbones.base import MixtureRouting, SparseFFN, register
from camex_ft.backbones.layouts import causal_stack, mixture_ffns, number, one_stack

if TYPE_CHECKING:
    from torch import nn

SHARED = ("shared_expert", "shared_expert_gate")  # of Qwen2-MoE


def routing(config: Any) -> MixtureRouting:
    """Return the routing: softmax over all, of which the k largest are scaled to sum to 1 with `norm_topk_prob`."""
    first = config.model_type.endswith("qwen2_moe")
    return MixtureRouting(
        experts=number(config, "num_experts", "num_local_experts", default=60 if first else 128),
        top_k=number(config, "num_experts_per_tok", default=4 if first else 8),
        normalise="after" if getattr(config, "norm_topk_prob", False) else "before",
    )


@register(
    "qwen_moe",
    model_types=("qwen3_moe", "qwen2_moe"),
    masks=one_stack(causal_stack),
    attention=("q_proj", "v_proj"),
    routing=routing,
)
def ffns(model: nn.Module) -> list[SparseFFN]:
    """Qwen2-MoE, Qwen3-MoE: decoder of sparse mixtures; dense blocks stay dense."""
    config: Any = model.config
    shared = SHARED if config.model_type.endswith("qwen2_moe") else ()
    return mixture_ffns(model, routing(config), shared=shared)
