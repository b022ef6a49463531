"""Parts of an upcycled model and which of them are trained: layers with experts, LoRA beside them, the head.

LoRA, by PEFT, adds thin trained maps B A to the maps of attention, which stay frozen:

    y = x W^T + c (x A^T) B^T            A at random, B = 0: the function is that of the model before

With the protocol `dense`, the baseline, the feed-forward maps get it as well. The maps of attention that get it are
named by the backbone's family, queries and values as in the paper.
Source: LoRA, Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as NAMED
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from camex_ft.backbones import DenseFFN, family_of, plain_type
from camex_ft.config.schema import LoraConfig
from camex_ft.moe.context import RoutingContext
from camex_ft.moe.layers.ffn import ExpertFFN, MergedFFN
from camex_ft.moe.layers.low_rank_expert_linear import LowRankLinear
from camex_ft.moe.layers.propagation import propagation_paths
from camex_ft.utils.errors import UserError, nearest

# of types for which neither the family nor PEFT names the maps
QUERIES_AND_VALUES = ("q", "v", "q_lin", "v_lin", "query", "value", "q_proj", "v_proj", "c_attn")


def expert_layers(model: nn.Module) -> dict[str, ExpertFFN]:
    """Return the layers with experts by name, in the order of the model; also through wrappers such as DDP."""
    return {m.name: m for m in model.modules() if isinstance(m, ExpertFFN)}


def base_chains(model: nn.Module) -> list[list[str]]:
    """Return the names of the layers along which each base expert is propagated, the layer that stores it first."""
    return propagation_paths(
        [layer for layer in expert_layers(model).values() if isinstance(layer, MergedFFN)]
    )


def routing_context(model: nn.Module) -> RoutingContext | None:
    """Return the model's routing context, or None where no layer has experts."""
    return next((layer.context for layer in expert_layers(model).values()), None)


def cached(model: nn.Module) -> AbstractContextManager[None]:
    """Declare the model's parameters unchanged in a ``with`` block, so that evaluation caches what depends on them.

    Without it every forward pass computes transformed domain vectors and merged experts again. `generate` and the
    Trainer's evaluations declare it themselves. In the block, changes through ``parameter.data`` are not noticed.
    """
    context = routing_context(model)
    return nullcontext() if context is None else context.cached()


@contextmanager
def fixed_routing(
    model: nn.Module, weights: Tensor | Sequence[float] | Mapping[str, Tensor | Sequence[float]]
) -> Iterator[None]:
    """Give every input the same routing weights in a ``with`` block, in place of the routers'.

    Args:
        model: upcycled.
        weights: of the experts, [N], such as one-hot or uniform; or these by the name of the layer
            (`expert_layers`), and layers without an entry keep their routers.

    Raises:
        UserError: the model has no experts or another number of them, or no layer of that name.
    """
    layers = expert_layers(model)
    by_layer = dict(weights) if isinstance(weights, Mapping) else dict.fromkeys(layers, weights)
    unknown = next((name for name in by_layer if name not in layers), None)
    if not layers or unknown is not None:
        raise UserError(
            f"there is no layer '{unknown}'.{nearest(str(unknown), layers)}"
            if layers
            else f"{type(model).__name__} has no experts to route to: expected a model from camex_ft.upcycle"
        )
    fixed = {name: torch.as_tensor(row, dtype=torch.float32) for name, row in by_layer.items()}
    for name, row in fixed.items():
        experts = layers[name].settings.experts
        if row.shape != (experts,):
            raise UserError(
                f"routing weights of {name}: expected {experts} numbers, got the shape {list(row.shape)}"
            )
    routers = {name: layers[name].router for name in fixed}
    before = {name: router.fixed for name, router in routers.items()}
    try:
        for name, router in routers.items():
            router.fixed = fixed[name]
        yield
    finally:
        for name, router in routers.items():
            router.fixed = before[name]


def keep_nothing(model: nn.Module) -> None:
    """Disable the caches of the expert layers, whose parameters are about to be sharded."""
    for layer in expert_layers(model).values():
        layer.sharded = True
        for linear in layer.linears.values():
            linear.sharded = True


def caches(model: nn.Module) -> bool:
    """Return whether generation may use a key-value cache: not with `first_segment: self`."""
    groupings = [
        layer.settings.grouping for layer in expert_layers(model).values() if layer.stack == "decoder"
    ]
    return all(g.granularity != "segment" or g.first_segment != "self" for g in groupings)


def freeze(model: PreTrainedModel, mode: str) -> None:
    """Freeze the parameters that a tuning mode does not train.

    "full": everything. "experts": the expert layers and the head alone. "lora": the same, less the base of low-rank
    experts and a language-modelling head, which is as large as the embeddings, and with LoRA's factors; all of it in
    float32, whatever the dtype of the frozen weights. "router": the routers alone; "router+curvature": these and the
    factors of the curvature.

    The head consists of the parameters outside the model's body or, if the body is not a separate module (T5 that
    generates), of the output embeddings. A head that is tied to the input embeddings belongs to the body.

    Raises:
        UserError: the model has nothing that the mode trains.
    """
    if mode == "full":
        return
    layers = expert_layers(model).values()
    low_rank: list[Any] = [m for m in model.modules() if isinstance(m, (LowRankLinear, LoraLayer))]
    if mode != "lora" and not layers:
        raise UserError(
            f"tuning.mode: {mode} needs layers with experts; the protocol `dense` has none: use full or lora"
        )
    if mode in ("router", "router+curvature"):
        _freeze_but_routers(model, layers, curvature=mode == "router+curvature")
        return
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


def _freeze_but_routers(model: PreTrainedModel, layers: Iterable[ExpertFFN], *, curvature: bool) -> None:
    """Freeze all parameters but those of routers and, if said, of curvature."""
    trained: list[nn.Module] = [layer.router for layer in layers]
    if curvature:
        curvatures = [linear.curvature for layer in layers for linear in layer.linears.values()]
        if None in curvatures:
            raise UserError(
                "tuning.mode: router+curvature needs a protocol with curvature, such as domain-ca: use router"
            )
        trained += curvatures
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)


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
    """Return the modules that LoRA adds to a dense layer."""
    parts: Any = (getattr(layer, name, None) for name in layer.adapter_layer_names)
    return nn.ModuleList(part for part in parts if isinstance(part, nn.Module))


def _as_float32(model: PreTrainedModel, head: list[Any]) -> None:
    """Convert trained parameters to float32, and the inputs of a head whose body has less precision."""
    changed = {id(p) for p in head if p.dtype in (torch.bfloat16, torch.float16)}
    for module in model.modules():
        if any(id(p) in changed for p in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_widen)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def _widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def add_lora(model: PreTrainedModel, lora: LoraConfig, ffns: Sequence[DenseFFN]) -> None:
    """Add LoRA to attention, if the settings say so, and to these feed-forward layers; in place.

    Raises:
        UserError: the model has no maps of the names.
    """
    chosen = _attention(model, lora) if lora.attention else []
    chosen += _within(model, ffns)
    if not chosen:
        return
    one = [isinstance(model.get_submodule(path), Conv1D) for path in chosen]
    settings = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.scale * lora.rank,  # type: ignore[arg-type]  # divided by r again
        lora_dropout=lora.dropout,
        target_modules=chosen,
        fan_in_fan_out=all(one),
    )
    inject_adapter_in_model(settings, model)


def _attention(model: PreTrainedModel, settings: LoraConfig) -> list[str]:
    """Return the paths of attention's maps that get LoRA."""
    family, model_type = family_of(model), plain_type(model.config.model_type)
    named = settings.targets or family.attention or NAMED.get(model_type) or QUERIES_AND_VALUES
    linears = list(_linears(model))
    names = sorted({path.rpartition(".")[2] for path in linears})
    unknown = [name for name in settings.targets or () if name not in names]
    paths = [path for path in linears if path.rpartition(".")[2] in named]
    if unknown or not paths:
        wrong = unknown[0] if unknown else ", ".join(named)
        raise UserError(
            f"tuning.lora.targets: {type(model).__name__} has no linear map '{wrong}'.{nearest(wrong, names)} "
            f"It has: {', '.join(names)}"
        )
    return paths


def _linears(model: PreTrainedModel) -> Iterable[str]:
    """Yield the paths of the model's linear maps, without those of experts."""
    return (path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)))


def _within(model: PreTrainedModel, ffns: Sequence[DenseFFN]) -> list[str]:
    """Return the paths of the linear maps of dense feed-forward layers."""
    places = [f"{path}." for ffn in ffns for path in (ffn.path, *ffn.silence)]
    return [path for path in _linears(model) if f"{path}.".startswith(tuple(places))] if places else []
