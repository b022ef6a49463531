"""Dense export: one model of the original architecture, its feed-forward layers merged once and for all.

    E_hat = E_m + alpha * sum_i s_bar_i keep_i M_i tau_i         domain vectors, static or carried (dynamic merging)
    E_hat = sum_i s_bar_i E_i                                    smear; smoe, where it is a mean expert

with the mean routing weights s_bar over a calibration split. What a layer did differently for different inputs is gone.
For `smoe` more is gone: a mean of experts computes something else than a mean of their outputs, since there is a
non-linearity within.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from camex_ft.exporting.plain import fill, plain_model
from camex_ft.moe.layers.ffn import ExpertFFN, MergedFFN
from camex_ft.upcycling import cached, expert_layers


@torch.no_grad()
def dense_model(model: PreTrainedModel, routing: Mapping[str, Tensor]) -> PreTrainedModel:
    """Return the original architecture with every layer's experts merged with fixed routing weights.

    LoRA on attention is put into the maps beside it. The model that is given stays as it is.

    Args:
        model: upcycled, in evaluation mode.
        routing: s_bar of every layer with experts; [N] by name.
    """
    made, ffns = plain_model(model, merge_lora=True)
    layers = expert_layers(model)
    with cached(model):
        for ffn in ffns:
            fill(ffn, merged_weights(layers[ffn.path], routing[ffn.path]))
    return made


@torch.no_grad()
def merged_weights(layer: ExpertFFN, s: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return E_hat [out, in] and b_hat [out] or None of a layer's maps, for routing weights [N]."""
    made = {}
    for name, (weight, bias) in merged_maps(layer, s.unsqueeze(0)).items():
        made[name] = (weight[0], None if bias is None else bias[0])
    return made


@torch.no_grad()
def merged_maps(layer: ExpertFFN, s: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return E_hat [n, out, in] and b_hat [n, out] or None of a layer's maps, for n rows of routing weights [n, N]."""
    bases = layer.carried() if isinstance(layer, MergedFFN) else {}
    weights = s.to(layer.router.gate.device, torch.promote_types(layer.router.gate.dtype, torch.float32))
    return {name: linear.merged(weights, bases.get(name)) for name, linear in layer.linears.items()}
