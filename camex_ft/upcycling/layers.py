"""What of an upcycled model others ask for: its layers with experts, their chains and context, what is trained."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from camex_ft.errors import UserError
from camex_ft.moe.context import RoutingContext
from camex_ft.moe.ffn import ExpertFFN, MergedFFN
from camex_ft.moe.link import chains


def expert_layers(model: nn.Module) -> dict[str, ExpertFFN]:
    """Return the layers with experts by name, in the order of the model; also through wrappers such as DDP."""
    return {m.name: m for m in model.modules() if isinstance(m, ExpertFFN)}


def base_chains(model: nn.Module) -> list[list[str]]:
    """Return the names of the layers along which each base expert is carried, the one that stores it first."""
    return chains([layer for layer in expert_layers(model).values() if isinstance(layer, MergedFFN)])


def routing_context(model: nn.Module) -> RoutingContext | None:
    """Return the model's routing context, or None where no layer has experts."""
    return next((layer.context for layer in expert_layers(model).values()), None)


def caches(model: nn.Module) -> bool:
    """Whether generation may use a key-value cache: not where a first segment is routed by itself, future included."""
    groupings = [
        layer.settings.grouping for layer in expert_layers(model).values() if layer.stack == "decoder"
    ]
    return all(g.granularity != "segment" or g.first_segment != "self" for g in groupings)


def freeze(model: PreTrainedModel, mode: str) -> None:
    """Choose what is trained: "full", everything; "experts", the expert layers and the head alone.

    The head is what stands outside the model's body, or, where the body has no module of its own (T5 that generates),
    the output embeddings. A head that is tied to the input embeddings belongs to the body.
    """
    if mode == "full":
        return
    if not expert_layers(model):
        raise UserError(
            "tuning.mode: experts needs layers with experts; the protocol `dense` has none: use full"
        )
    if model.base_model is not model:
        for parameter in model.base_model.parameters():
            parameter.requires_grad_(False)
    else:
        head, tied = model.get_output_embeddings(), model.get_input_embeddings()
        for parameter in model.parameters():
            own = head is not None and parameter is head.weight and parameter is not tied.weight
            parameter.requires_grad_(own)
    for layer in expert_layers(model).values():
        for parameter in layer.parameters():
            parameter.requires_grad_(True)
