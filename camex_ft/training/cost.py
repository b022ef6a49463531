"""Cost of a model and a run: parameters, operations, memory, devices."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from camex_ft.backbones import SparseFFN, family_of
from camex_ft.moe.layers.expert_linear import ExpertLinear
from camex_ft.moe.layers.ffn import ExpertFFN, MixtureFFN
from camex_ft.moe.layers.low_rank_expert_linear import LowRankLinear
from camex_ft.upcycling import expert_layers
from camex_ft.utils.errors import UserError

STEMS = {"expert": "experts", "base": "base"}  # how names of parameters begin


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters, each counted once however often it is used.

    Attributes:
        total: all of them.
        trainable: those that are trained.
        active: those that one token meets: of a layer with experts its router and one merged feed-forward layer, or k
            experts of a mixture. Experts of low rank are not merged: it meets the base and the factors of all experts,
            or of k in a mixture.
        experts, base, routers, curvature: of the layers with experts, biases included.
        statistics: what protocols keep about experts in buffers as large as they are; no parameters.
    """

    total: int
    trainable: int
    active: int
    experts: int = 0
    base: int = 0
    routers: int = 0
    curvature: int = 0
    statistics: int = 0


def count_parameters(model: nn.Module) -> Parameters:
    """Return the numbers of parameters of a model with or without experts; works on the meta device as well."""
    sizes = {id(p): p.numel() for p in model.parameters()}
    kinds: dict[str, dict[int, int]] = {kind: {} for kind in ("experts", "base", "routers", "curvature")}
    met = statistics = 0
    layers = list(expert_layers(model).values())
    for layer in layers:
        met += _met(layer)
        maps = [linear for linear in layer.linears.values() if isinstance(linear, ExpertLinear)]
        buffers = [buffer for linear in maps for buffer in (linear.statistic, linear.bias_statistic)]
        statistics += sum(buffer.numel() for buffer in buffers if buffer is not None)
        for name, parameter in layer.named_parameters():
            if (kind := _kind(name)) is not None:
                kinds[kind][id(parameter)] = parameter.numel()
    sizes_of = {kind: sum(members.values()) for kind, members in kinds.items()}
    mergeable = sizes_of["experts"] + sizes_of["base"] + sizes_of["curvature"]
    return Parameters(
        total=sum(sizes.values()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        active=sum(sizes.values()) - mergeable + met - _idle(model),
        statistics=statistics,
        **sizes_of,
    )


def describe(model: PreTrainedModel) -> dict[str, int]:
    """Return the number of ``parameters``, of ``trainable`` and ``active`` ones, and ``flops_per_token``.

    Operations are those of a forward pass, 2 for each active parameter (`Parameters`) outside the embeddings (one that
    is the head's matrix as well counts); merging, which is paid once a sequence or segment, is not among them.
    """
    counted = count_parameters(model)
    embeddings = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            embeddings.pop(id(module.weight), None)
    return {
        "parameters": counted.total,
        "trainable": counted.trainable,
        "active": counted.active,
        "flops_per_token": 2 * (counted.active - sum(embeddings.values())),
    }


def _idle(model: nn.Module) -> int:
    """Return how many parameters of mixtures of the backbone that were not replaced a token does not meet."""
    try:
        ffns = family_of(model).ffns(model)
    except UserError:  # another module, or a wrapped one
        return 0
    mixtures = [ffn for ffn in ffns if isinstance(ffn, SparseFFN)]
    return sum(m.numbers - m.numbers * m.routing.top_k // m.routing.experts for m in mixtures)


def _kind(name: str) -> str | None:
    """Return which part of a layer with experts a parameter belongs to, by its name in the layer."""
    parts = name.split(".")
    if "router" in parts:
        return "routers"
    if "curvature" in parts:
        return "curvature"
    return next((kind for stem, kind in STEMS.items() if parts[-1].startswith(stem)), None)


def _met(layer: ExpertFFN) -> int:
    """Return how many parameters of experts a token meets: one merged layer, or k experts of a mixture."""
    mixture = isinstance(layer, MixtureFFN)
    k = layer.settings.top_k if mixture else 1
    total = 0
    for linear in layer.linears.values():
        if isinstance(linear, LowRankLinear):
            met = layer.settings.top_k if mixture else layer.settings.experts
            total += linear.base.numel() + met * (linear.expert_out[0].numel() + linear.expert_in[0].numel())
        else:
            total += k * linear.experts[0].numel()
        total += 0 if linear.expert_bias is None else k * linear.expert_bias[0].numel()
    return total


def rows_read(epochs: float, rows: int, batch: int, *, drop_last: bool = False) -> int:
    """Return how many rows training has read, each as often as it was read.

    Args:
        epochs: done, as the Trainer counts them: by batches of the forward pass.
        rows: of the train split.
        batch: rows of such a batch, over all processes.
        drop_last: a last batch that is not full is left out.
    """
    batches = max(rows // batch if drop_last else -(-rows // batch), 1)
    whole, more = divmod(round(epochs * batches), batches)
    return whole * min(batches * batch, rows) + min(more * batch, rows)


def peak_memory_mb(device: str = "cpu") -> float:
    """Return the greatest memory so far, in MB: of the GPU where that is the type of device, else of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def devices(arguments: TrainingArguments) -> list[str]:
    """Return the names of the GPUs of all processes, which are of one kind; an empty list on a CPU."""
    if arguments.device.type != "cuda":
        return []
    return [torch.cuda.get_device_name(arguments.device)] * max(arguments.world_size, arguments.n_gpu)
