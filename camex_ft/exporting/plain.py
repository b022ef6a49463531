"""The original architecture of an upcycled model: its class, its configuration, and its weights outside the experts."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from camex_ft.backbones import DenseFFN, family_of
from camex_ft.upcycling import expert_layers, plain_class, plain_config


@torch.no_grad()
def plain_model(model: PreTrainedModel, *, merge_lora: bool) -> tuple[PreTrainedModel, list[DenseFFN]]:
    """Return a model of the original architecture with the weights that are outside the experts, and where they were.

    The feed-forward layers that had experts are left as they were drawn: `fill` sets them.

    Args:
        model: upcycled, or as it was.
        merge_lora: put LoRA's part of a map into its weights; else leave it out.
    """
    kind = plain_class(type(model))
    with torch.random.fork_rng(devices=[]):
        made: PreTrainedModel = kind._from_config(plain_config(model.config), dtype=model.dtype).eval()
    made.name_or_path = made.config.name_or_path = ""  # it may be a folder here
    if model.can_generate():
        made.generation_config = copy.deepcopy(model.generation_config)
    layers = expert_layers(model)
    ffns = [ffn for ffn in family_of(made).ffns(made) if ffn.path in layers]
    left_out = tuple(f"{path}." for ffn in ffns for path in (ffn.path, *ffn.silence))
    state = _state(model, layers, merge_lora=merge_lora)
    for name, tensor in made.state_dict().items():
        given = state.pop(name, None)
        if given is not None:
            tensor.copy_(given)
        elif not name.startswith(left_out):
            raise RuntimeError(f"{type(model).__name__} has no weight {name}, which a {kind.__name__} needs")
    if state:
        raise RuntimeError(f"a {kind.__name__} has no weight {min(state)}, which {type(model).__name__} has")
    return made, ffns


@torch.no_grad()
def fill(ffn: DenseFFN, weights: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
    """Set the matrices [out, in] and biases [out] of a dense feed-forward layer, in place."""
    for name, (weight, bias) in ffn.weights.items():
        given, given_bias = weights[name]
        weight.copy_(given)  # a view of the model's own parameter
        if bias is not None and given_bias is not None:
            bias.copy_(given_bias)


def _state(model: nn.Module, layers: Iterable[str], *, merge_lora: bool) -> dict[str, Tensor]:
    """Return the state without expert layers, under the names of the dense model."""
    loras = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    apart = tuple(f"{path}." for path in (*layers, *loras))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(apart)}
    for path, layer in loras.items():
        for name, tensor in _without_lora(layer, merge=merge_lora).state_dict().items():
            state[f"{path}.{name}"] = tensor
    return state


def _without_lora(layer: Any, *, merge: bool) -> nn.Module:
    if not merge:
        plain: nn.Module = layer.get_base_layer()
        return plain
    merged = copy.deepcopy(layer)
    merged.merge()
    made: nn.Module = merged.get_base_layer()
    return made
