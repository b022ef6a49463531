"""Folded export: curvature and mask put into the experts, once and for all.

    E_i' = E_m + alpha keep_i M_i tau_i      protocol `smear`:   E_hat = sum_i s_i E_i'            where sum_i s_i = 1
    E_i' = E_m + keep_i M_i tau_i            protocol `domain`:  E_hat = E_m + alpha * sum_i s_i (E_i' - E_m)    else

Routing weights sum to 1 but for `routing.normalise: before` with fewer than all experts. Both are the same there; the
first needs no base expert, and so makes no domain vectors, which is faster than any that are kept.

The result computes what the model computed, for every input: router and granularity stay. It has no factors of
curvature and no statistics, and nothing is carried from layer to layer. Experts of low rank stay so:
M_i (B_i A_i) = B_i' A_i', of R times the rank for curvature of R terms.
Source: CAMEx (arXiv 2502.18821), re-parameterisation at test time.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from camex_ft import upcycling
from camex_ft.exporting.dense import merged_maps
from camex_ft.exporting.plain import fill, plain_model
from camex_ft.moe.layers.ffn import ExpertFFN, MergedFFN
from camex_ft.protocols import Protocol
from camex_ft.upcycling import adapters, expert_layers
from camex_ft.upcycling.entry import KEY
from camex_ft.upcycling.restructuring import plan_of
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import PROTOCOLS

SUMMED, STEPPED = "smear", "domain"


def check_foldable(protocol: Protocol) -> None:
    """Raise `UserError` where a protocol has nothing to fold.

    A multiplier that is drawn for training alone, as that of `dare`, is 1 in evaluation.
    """
    weighs = protocol.weigh is not None and not protocol.random
    if not (protocol.curvature or weighs):
        raise UserError(
            f"protocol '{protocol.name}' has neither curvature nor a mask that acts in evaluation, so there is nothing "
            "to fold: the run's model/ folder is what it would be. Expected --as dense, or a run of a protocol with "
            "curvature (domain-ca, ties-ca, ...) or a mask (ties, fisher)"
        )


@torch.no_grad()
def folded_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the protocol `smear` or `domain` that computes what `model` does; `model` stays as it is.

    Args:
        model: upcycled, in evaluation mode.

    Raises:
        UserError: its protocol has nothing to fold.
    """
    kept: dict[str, Any] = dict(getattr(model.config, KEY, None) or {"merging": {"protocol": "dense"}})
    check_foldable(PROTOCOLS.get(kept["merging"]["protocol"]))
    layers = expert_layers(model)
    dense, ffns = plain_model(model, merge_lora=False)
    with upcycling.cached(model):
        for ffn in ffns:
            fill(ffn, _bases(layers[ffn.path]))
    about = kept.get(adapters.BACKBONE) or {}
    dense.name_or_path = dense.config.name_or_path = about.get("name", "")
    made = upcycling.upcycle(dense, **_sections(kept, layers), seed=about.get("seed", 0), in_place=True)
    with upcycling.cached(model):
        for name, layer in expert_layers(made).items():
            _fold(layers[name], layer)
    _copy_lora(model, made)
    return made.eval()


def _sections(kept: dict[str, Any], layers: dict[str, ExpertFFN]) -> dict[str, Any]:
    """Return the sections of the configuration that say what the folded model is."""
    plan = plan_of(kept)
    names = ["experts", "top_k", "keep_vectors"]
    summed = plan.routing.normalise == "after" or plan.merging.k == plan.merging.experts
    merging = plan.merging.model_dump(include={*names, *([] if summed else ["alpha"])})
    made = {
        "merging": {**merging, "protocol": SUMMED if summed else STEPPED},
        "routing": plan.routing,
        "upcycle": {"layers": plan.upcycle.layers},
    }
    if plan.tuning.mode != "lora":
        return made
    lora = plan.tuning.lora.model_copy(update={"rank": _rank(layers)})
    return {**made, "tuning": plan.tuning.model_copy(update={"lora": lora})}


def _rank(layers: dict[str, ExpertFFN]) -> int:
    """Return the rank that experts of low rank have with their curvature."""
    return int(next(iter(layers.values())).up.factors()[1].shape[1])


def _bases(layer: ExpertFFN) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return E_m [out, in] and b_m [out] or None of a layer's maps, also where they are carried."""
    carried = layer.carried() if isinstance(layer, MergedFFN) else {}
    found = {}
    for name, linear in layer.linears.items():
        weight, bias = carried.get(name, linear.own)
        found[name] = (weight.base, None if bias is None else bias.base)
    return found


def _fold(layer: ExpertFFN, into: ExpertFFN) -> None:
    """Set the experts of a layer of the folded model, whose base expert is set where it has one, and its router."""
    into.router.load_state_dict(layer.router.state_dict())
    n, bases = layer.settings.experts, _bases(layer)
    alpha = layer.settings.alpha if into.settings.base else None
    # each expert by itself: E_m + alpha keep_i M_i tau_i
    each = {} if layer.low_rank else merged_maps(layer, torch.eye(n))
    for name, linear in layer.linears.items():
        target, (base, base_bias) = into.linears[name], bases[name]
        if layer.low_rank:
            left, right = linear.factors()
            target.expert_out.copy_(left if alpha is not None else layer.settings.alpha * left)
            target.expert_in.copy_(right)
            bias = linear.merged_bias(torch.eye(n, device=left.device))
            bias = None if bias is None else bias.flatten(1)
        else:
            weights, bias = each[name]
            target.experts.copy_(_without_step(weights, base, alpha))
        if bias is not None:
            target.expert_bias.copy_(_without_step(bias, base_bias, alpha))


def _without_step(merged: Tensor, base: Tensor | None, alpha: float | None) -> Tensor:
    """Return E_m + T_i of E_m + alpha T_i, where alpha is to be applied again; of alpha 0 nothing of T_i is left."""
    if base is None or alpha in (None, 0.0, 1.0):
        return merged
    return base + (merged - base) / alpha


def _copy_lora(model: nn.Module, into: nn.Module) -> None:
    """Copy LoRA beside attention; where it has got a higher rank with the experts, the rest of it is 0."""
    old: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    for path, layer in old.items():
        target: Any = into.get_submodule(path)
        for adapter, a in layer.lora_A.items():
            b, new_a, new_b = layer.lora_B[adapter], target.lora_A[adapter], target.lora_B[adapter]
            rank = a.weight.shape[0]
            new_a.weight.zero_()[:rank] = a.weight
            new_b.weight.zero_()[:, :rank] = b.weight
