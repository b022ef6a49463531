"""What a model and a run cost: parameters, operations, memory, devices."""

from __future__ import annotations

import resource
import sys
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from camex_ft.moe.experts import ExpertLinear
from camex_ft.moe.ffn import ExpertFFN, MixtureFFN
from camex_ft.upcycling import expert_layers


class Speed(NamedTuple):
    """Training's rows and tokens (of inputs, without padding) a second, evaluations left out."""

    samples: float
    tokens: float


def describe(model: PreTrainedModel) -> dict[str, int]:
    """Return the number of ``parameters``, of ``trainable`` and ``active`` ones, and ``flops_per_token``.

    Active parameters are those that one token meets: of a layer with experts its router and one merged feed-forward
    layer, or k experts of a mixture. Operations are those of a forward pass, 2 for each active parameter outside the
    embeddings (one that is the head's matrix as well counts); merging, which is paid once a sequence or segment, is
    not among them.
    """
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    active = total - sum(_idle(layer) for layer in expert_layers(model).values())
    embeddings = {
        id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding)
    }
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            embeddings.pop(id(module.weight), None)
    return {
        "parameters": total,
        "trainable": trainable,
        "active": active,
        "flops_per_token": 2 * (active - sum(embeddings.values())),
    }


def _idle(layer: ExpertFFN) -> int:
    met = layer.settings.top_k if isinstance(layer, MixtureFFN) else 1
    idle = 0
    for linear in layer.children():
        if isinstance(linear, ExpertLinear):
            one = linear.experts[0].numel() + (
                0 if linear.expert_bias is None else linear.expert_bias[0].numel()
            )
            idle += sum(p.numel() for p in linear.parameters()) - met * one
    return idle


def peak_memory_mb() -> float:
    """Return the greatest memory so far, in MB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def devices() -> list[str]:
    """Return the names of the visible GPUs; an empty list on a CPU."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
