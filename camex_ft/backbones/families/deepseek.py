"""DeepSeek-V2: sparse mixtures beside shared experts, after a few dense blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from camex_ft.backbones.base import MixtureRouting, SparseFFN, register
from camex_ft.backbones.layouts import causal_stack, mixture_ffns, number, one_stack
from camex_ft.utils.errors import UserError

if TYPE_CHECKING:
    from torch import nn

V3 = (
    "DeepSeek-V3 routes by sigmoid scores with a correction bias, within groups of experts, which layers with experts "
    "do not compute. Expected a DeepSeek-V2 with topk_method: greedy, or another type of mixture"
)


def routing(config: Any) -> MixtureRouting:
    """Return the routing: softmax over all, of which the k largest count, times `routed_scaling_factor`.

    Raises:
        UserError: tokens are routed within groups of experts.
    """
    groups, chosen = getattr(config, "n_group", None), getattr(config, "topk_group", None)
    if getattr(config, "topk_method", "greedy") != "greedy" and groups != chosen:
        raise UserError(
            f"topk_method: {config.topk_method} routes a token to {chosen} of {groups} groups of experts, which layers "
            "with experts do not compute: expected topk_method: greedy, as of DeepSeek-V2-Lite"
        )
    return MixtureRouting(
        experts=number(config, "n_routed_experts", "num_experts", default=64),
        top_k=number(config, "num_experts_per_tok", default=6),
        normalise="before",
        scale=float(getattr(config, "routed_scaling_factor", 1.0)),
    )


@register(
    "deepseek",
    model_types=("deepseek_v2",),
    masks=one_stack(causal_stack),
    attention=("q_proj", "q_b_proj", "kv_b_proj"),
    routing=routing,
    refused={"deepseek_v3": V3},
)
def ffns(model: nn.Module) -> list[SparseFFN]:
    """DeepSeek-V2: decoder of sparse mixtures; dense blocks stay dense."""
    return mixture_ffns(model, routing(model.config), shared=("shared_experts",))
