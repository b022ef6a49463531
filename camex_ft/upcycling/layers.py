"""Parts of an upcycled model: its layers with experts, their chains and context, its trained parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from camex_ft.moe.context import RoutingContext
from camex_ft.moe.layers.ffn import ExpertFFN, MergedFFN
from camex_ft.moe.layers.low_rank_expert_linear import LowRankLinear
from camex_ft.moe.layers.propagation import chains
from camex_ft.utils.errors import UserError


def expert_layers(model: nn.Module) -> dict[str, ExpertFFN]:
    """Return the layers with experts by name, in the order of the model; also through wrappers such as DDP."""
    return {m.name: m for m in model.modules() if isinstance(m, ExpertFFN)}


def base_chains(model: nn.Module) -> list[list[str]]:
    """Return the names of the layers along which each base expert is carried, the one that stores it first."""
    return chains([layer for layer in expert_layers(model).values() if isinstance(layer, MergedFFN)])


def routing_context(model: nn.Module) -> RoutingContext | None:
    """Return the model's routing context, or None where no layer has experts."""
    return next((layer.context for layer in expert_layers(model).values()), None)


def cached(model: nn.Module) -> AbstractContextManager[None]:
    """Declare the model's parameters unchanged in a ``with`` block, so that what evaluation makes of them is made once.

    Without it every forward pass makes transformed domain vectors and merged experts again. `generate` and the
    Trainer's evaluations declare it themselves. In the block, a change through ``parameter.data`` is not seen.
    """
    context = routing_context(model)
    return nullcontext() if context is None else context.cached()


def keep_nothing(model: nn.Module) -> None:
    """Let the layers with experts keep nothing that is made of their parameters, which are about to be sharded."""
    for layer in expert_layers(model).values():
        layer.sharded = True
        for linear in layer.linears.values():
            linear.sharded = True


def caches(model: nn.Module) -> bool:
    """Return whether generation may use a key-value cache: not where a first segment is routed by itself."""
    groupings = [
        layer.settings.grouping for layer in expert_layers(model).values() if layer.stack == "decoder"
    ]
    return all(g.granularity != "segment" or g.first_segment != "self" for g in groupings)


def freeze(model: PreTrainedModel, mode: str) -> None:
    """Choose what is trained.

    "full": everything. "experts": the expert layers and the head alone. "lora": the same, less the base of low-rank
    experts and a language-modelling head, which is as large as the embeddings, and with LoRA's factors; all of it in
    float32, whatever the frozen weights are.

    The head is what stands outside the model's body, or, where the body has no module of its own (T5 that generates),
    the output embeddings. A head that is tied to the input embeddings belongs to the body.

    Raises:
        UserError: the model has nothing that the mode trains.
    """
    if mode == "full":
        return
    layers = expert_layers(model).values()
    low_rank: list[Any] = [m for m in model.modules() if isinstance(m, (LowRankLinear, LoraLayer))]
    if mode == "experts" and not layers:
        raise UserError(
            "tuning.mode: experts needs layers with experts; the protocol `dense` has none: use full or lora"
        )
    if mode == "lora" and not low_rank:
        raise UserError(
            f"tuning.mode: lora needs a model that was made for it, and {type(model).__name__} was not: give "
            "tuning={'mode': 'lora'} to upcycle"
        )
    head = list(_head(model))
    if mode == "lora":
        embeddings = model.get_output_embeddings()
        large = [] if embeddings is None else [id(p) for p in embeddings.parameters()]
        head = [p for p in head if id(p) not in large]
    model.requires_grad_(False)
    for parameter in (*head, *(p for layer in layers for p in layer.parameters())):
        parameter.requires_grad_(True)
    for module in low_rank:
        if isinstance(module, LowRankLinear):
            for base in (module.base, module.base_bias):
                if base is not None:
                    base.requires_grad_(False)
        else:
            _lora(module).requires_grad_(True)
    if mode == "lora":
        _as_float32(model, head)


def _head(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Yield the parameters of the model's head."""
    inner: nn.Module = model.base_model
    if inner is not model:
        body = {id(parameter) for parameter in inner.parameters()}
        for module in model.modules():
            yield from (p for p in module.parameters(recurse=False) if id(p) not in body)
        return
    head, tied = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None:
        yield from (p for p in head.parameters() if p is not tied.weight)


def _lora(layer: LoraLayer) -> nn.ModuleList:
    """Return the parts of a layer of PEFT's that LoRA adds to the dense one."""
    found: Any = (getattr(layer, name, None) for name in layer.adapter_layer_names)
    return nn.ModuleList(part for part in found if isinstance(part, nn.Module))


def _as_float32(model: PreTrainedModel, head: list[Any]) -> None:
    """Turn what is trained to float32; a head then takes what a body of less precision gives it in float32 too."""
    changed = {id(p) for p in head if p.dtype in (torch.bfloat16, torch.float16)}
    for module in model.modules():
        if any(id(p) in changed for p in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_widen)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def _widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
