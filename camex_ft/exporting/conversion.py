"""Exported models: the original architecture, with merged layers or its own experts, and experts without curvature.

Dense: one model of the original architecture. Each layer's experts are merged once, with the mean routing weights s_bar
of a calibration split:

    E_hat = E_m + alpha * sum_i s_bar_i multiplier_i M_i tau_i   with a base expert, static or propagated
    E_hat = sum_i s_bar_i E_i                                    smear, and smoe as a mean expert

The layer then treats all inputs alike. For `smoe` more is lost: with the non-linearity in between, a mean of experts is
not a mean of their outputs.

Experts, of a model that started from a sparse mixture's own: the mixture again, with the experts and routers as
trained, curvature and multiplier within the experts as in the next form. The mixture routes each token by itself and
mixes outputs, which is what `smoe` computes; of a protocol that merges weights it computes something else.

Folded: experts that include curvature and multiplier. The model computes the same for every input.

    E_i' = E_m + alpha multiplier_i M_i tau_i   protocol `smear`:   E_hat = sum_i s_i E_i'       where sum_i s_i = 1
    E_i' = E_m + multiplier_i M_i tau_i         protocol `domain`:  E_hat = E_m + alpha * sum_i s_i (E_i' - E_m)  else

Routing weights sum to 1 except under `routing.normalise: before` with fewer than all experts. The first form needs no
base expert and no domain vectors, so it is the faster one. Router and granularity stay; factors of curvature,
statistics and propagation between layers go. Experts of low rank stay so: M_i (B_i A_i) = B_i' A_i', of R times the
rank for a curvature of R terms. Source: CAMEx (arXiv 2502.18821), re-parameterisation at test time.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from camex_ft import upcycling
from camex_ft.backbones import DenseFFN, SparseFFN, family_of
from camex_ft.config.schema import OWN_EXPERTS, RoutingConfig
from camex_ft.moe.layers.ffn import ExpertFFN, MergedFFN
from camex_ft.protocols import Protocol
from camex_ft.upcycling import adapters, cached, expert_layers, plain_class, plain_config
from camex_ft.upcycling.own_experts import fill_mixture, mixtures_among, routing_of
from camex_ft.upcycling.plan import KEY, plan_of
from camex_ft.utils.errors import FunctionChanged, UserError
from camex_ft.utils.registry import PROTOCOLS

# -- the original architecture ----------------------------------------------------------------------------------------


@torch.no_grad()
def plain_model(model: PreTrainedModel, *, merge_lora: bool) -> tuple[PreTrainedModel, list[DenseFFN]]:
    """Return a model of the original architecture with the weights outside the experts, and its layers without weights.

    These are the feed-forward layers that had experts: `fill` sets them. LoRA is added to the weights beside it, or
    left out.
    """
    kind = plain_class(type(model))
    with torch.random.fork_rng(devices=[]):
        plain: PreTrainedModel = kind._from_config(plain_config(model.config), dtype=model.dtype).eval()
    plain.name_or_path = plain.config.name_or_path = ""  # it may name a local folder
    if model.can_generate():
        plain.generation_config = copy.deepcopy(model.generation_config)
    layers = expert_layers(model)
    ffns = [ffn for ffn in family_of(plain).ffns(plain) if ffn.path in layers]
    left_out = tuple(f"{path}." for ffn in ffns for path in (ffn.path, *ffn.silence))
    state = _state(model, layers, merge_lora=merge_lora)
    for name, tensor in plain.state_dict().items():
        trained = state.pop(name, None)
        if trained is not None:
            tensor.copy_(trained)
        elif not name.startswith(left_out):
            raise RuntimeError(f"{type(model).__name__} has no weight {name}, which a {kind.__name__} needs")
    if state:
        raise RuntimeError(f"a {kind.__name__} has no weight {min(state)}, which {type(model).__name__} has")
    return plain, ffns


@torch.no_grad()
def fill(ffn: DenseFFN, weights: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
    """Set the matrices [out, in] and biases [out] of a feed-forward layer, in place; of a mixture every expert's."""
    if isinstance(ffn, SparseFFN):
        experts = {n: w.expand_as(ffn.experts[n]) for n, (w, _) in weights.items()}
        fill_mixture(ffn, experts, ffn.router.t().clone())
        return
    for name, (weight, bias) in ffn.weights.items():
        new_weight, new_bias = weights[name]
        weight.copy_(new_weight)  # a view of the model's own parameter
        if bias is not None and new_bias is not None:
            bias.copy_(new_bias)


def _state(model: nn.Module, layers: Iterable[str], *, merge_lora: bool) -> dict[str, Tensor]:
    """Return the state without expert layers, under the names of the dense model."""
    loras = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    apart = tuple(f"{path}." for path in (*layers, *loras))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(apart)}
    for path, lora in loras.items():
        layer: Any = copy.deepcopy(lora) if merge_lora else lora
        if merge_lora:
            layer.merge()
        for name, tensor in layer.get_base_layer().state_dict().items():
            state[f"{path}.{name}"] = tensor
    return state


# -- dense ------------------------------------------------------------------------------------------------------------


def check_dense(upcycle: Mapping[str, Any], protocol: Protocol) -> None:
    """Raise `UserError` if the original architecture is a sparse mixture, by a configuration's section `upcycle`."""
    if protocol.form != "dense" and upcycle.get("init") == OWN_EXPERTS:
        raise UserError(
            "--as dense needs an original architecture of dense layers, and a run of upcycle.init: "
            f"{OWN_EXPERTS} started from a sparse mixture: use --as experts, or --as folded"
        )


@torch.no_grad()
def dense_model(model: PreTrainedModel, routing: Mapping[str, Tensor]) -> PreTrainedModel:
    """Return the original architecture with every layer's experts merged with fixed routing weights.

    LoRA on attention is added to the weights beside it. `model` does not change.

    Args:
        model: upcycled, in evaluation mode.
        routing: s_bar of every layer with experts; [N] by name.

    Raises:
        UserError: the original architecture is a sparse mixture.
    """
    record = dict(getattr(model.config, KEY, None) or {})
    check_dense(record.get("upcycle") or {}, PROTOCOLS.get(plan_of(record).merging.protocol))
    plain, ffns = plain_model(model, merge_lora=True)
    layers = expert_layers(model)
    with cached(model):
        for ffn in ffns:
            maps = merged_maps(layers[ffn.path], routing[ffn.path].unsqueeze(0))
            fill(
                ffn, {n: (weight[0], None if bias is None else bias[0]) for n, (weight, bias) in maps.items()}
            )
    return plain


@torch.no_grad()
def merged_maps(layer: ExpertFFN, s: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return E_hat [n, out, in] and b_hat [n, out] or None of a layer's maps, for n rows of routing weights [n, N]."""
    bases = layer.propagated_bases() if isinstance(layer, MergedFFN) else {}
    weights = s.to(layer.router.gate.device, torch.promote_types(layer.router.gate.dtype, torch.float32))
    return {name: linear.merged(weights, bases.get(name)) for name, linear in layer.linears.items()}


# -- experts ----------------------------------------------------------------------------------------------------------


def check_mixture(upcycle: Mapping[str, Any], routing: RoutingConfig, protocol: Protocol) -> None:
    """Raise `UserError` unless a sparse mixture can hold a model's experts and routers.

    Args:
        upcycle: section of the configuration.
        routing: section of the configuration.
        protocol: of the run.
    """
    why = ""
    if protocol.form == "dense":
        why = "the protocol dense has no experts, and RUN/model is a model of the backbone's class already"
    elif upcycle.get("init") != OWN_EXPERTS:
        why = f"upcycle.init is {upcycle.get('init', 'copy')}, and only a run of {OWN_EXPERTS} started from a mixture"
    elif routing.router != "linear" or routing.init != "random":
        router = f"{routing.router} router" if routing.router != "linear" else "router with an intercept"
        why = f"the run has a {router}, and a mixture's is linear without one"
    if why:
        raise UserError(f"--as experts: {why}. Expected --as dense or folded, or the run's model/ folder")


@torch.no_grad()
def mixture_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the backbone's own sparse mixture with a model's experts and routers as trained.

    With protocol `smoe` it computes the same; with others it does not. `model` does not change.

    Args:
        model: upcycled from a mixture's own experts, in evaluation mode.

    Raises:
        UserError: it was not, or a mixture has no place for its routers.
    """
    record: dict[str, Any] = dict(getattr(model.config, KEY, None) or {"merging": {"protocol": "dense"}})
    plan = plan_of(record)
    check_mixture(record.get("upcycle") or {}, plan.routing, PROTOCOLS.get(plan.merging.protocol))
    mixture = routing_of(model)
    if (
        plan.merging.protocol == "smoe"
        and mixture is not None
        and plan.routing.normalise != mixture.normalise
    ):
        raise UserError(
            f"--as experts: the run normalises routing weights {plan.routing.normalise} the choice of experts, the "
            f"mixture {mixture.normalise} it. Expected the run's model/ folder"
        )
    plain, ffns = plain_model(model, merge_lora=True)
    layers = expert_layers(model)
    with cached(model):
        for ffn in mixtures_among(ffns):
            layer = layers[ffn.path]
            each = _experts_of(layer)
            # the temperature of routing divides the logits
            fill_mixture(ffn, each, layer.router.gate / plan.routing.temperature)
    return plain


def _experts_of(layer: ExpertFFN) -> dict[str, Tensor]:
    """Return the experts [N, out, in] of a layer's maps, with curvature and multiplier."""
    if not isinstance(layer, MergedFFN):
        return {name: linear.experts.detach() for name, linear in layer.linears.items()}
    each = merged_maps(layer, torch.eye(layer.settings.experts))
    return {name: weight for name, (weight, _) in each.items()}


# -- folded -----------------------------------------------------------------------------------------------------------


SUMMED, STEPPED = "smear", "domain"


def check_foldable(protocol: Protocol) -> None:
    """Raise `UserError` if a protocol has nothing to fold.

    A multiplier that is drawn in training alone, like that of `dare`, is 1 in evaluation.
    """
    weighs = protocol.multiplier is not None and not protocol.random
    if not (protocol.curvature or weighs):
        raise UserError(
            f"protocol '{protocol.name}' has no curvature and no mask in evaluation, so there is nothing to fold: the "
            "export would equal the run's model/ folder. Use --as dense, or a run of a protocol with curvature "
            "(domain-ca, ties-ca, ...) or a mask (ties, fisher)"
        )


@torch.no_grad()
def folded_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the protocol `smear` or `domain` that computes the same as `model`, which does not change.

    Raises:
        UserError: its protocol has nothing to fold.
    """
    record: dict[str, Any] = dict(getattr(model.config, KEY, None) or {"merging": {"protocol": "dense"}})
    check_foldable(PROTOCOLS.get(record["merging"]["protocol"]))
    layers = expert_layers(model)
    dense, ffns = plain_model(model, merge_lora=False)
    with upcycling.cached(model):
        for ffn in ffns:
            fill(ffn, _bases(layers[ffn.path]))
    about = record.get(adapters.BACKBONE) or {}
    dense.name_or_path = dense.config.name_or_path = about.get("name", "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FunctionChanged)  # its experts and router are set below
        folded = upcycling.upcycle(
            dense, **_sections(record, layers), seed=about.get("seed", 0), in_place=True
        )
    with upcycling.cached(model):
        for name, layer in expert_layers(folded).items():
            _fold(layers[name], layer)
    _copy_lora(model, folded)
    if adapters.BACKBONE not in record:  # saved whole: no backbone has its frozen weights
        getattr(folded.config, KEY).pop(adapters.BACKBONE, None)
    return folded.eval()


def _sections(record: dict[str, Any], layers: dict[str, ExpertFFN]) -> dict[str, Any]:
    """Return the configuration of the folded model."""
    plan = plan_of(record)
    names = ["experts", "top_k", "keep_vectors"]
    summed = plan.routing.normalise == "after" or plan.merging.k == plan.merging.experts
    merging = plan.merging.model_dump(include={*names, *([] if summed else ["alpha"])})
    own = {"init": OWN_EXPERTS} if plan.upcycle.init == OWN_EXPERTS else {}
    sections: dict[str, Any] = {
        "merging": {**merging, "protocol": SUMMED if summed else STEPPED},
        "routing": plan.routing,
        "upcycle": {"layers": plan.upcycle.layers, **own},
    }
    if all(layer.low_rank is None for layer in layers.values()):
        return sections
    rank = int(next(iter(layers.values())).up.factors()[1].shape[1])  # of the experts with their curvature
    if plan.tuning.mode != "lora":
        return {**sections, "upcycle": {**sections["upcycle"], "rank": rank}}
    lora = plan.tuning.lora.model_copy(update={"rank": rank})
    return {**sections, "tuning": plan.tuning.model_copy(update={"lora": lora})}


def _bases(layer: ExpertFFN) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return E_m [out, in] and b_m [out] or None of a layer's maps, its own or propagated."""
    propagated = layer.propagated_bases() if isinstance(layer, MergedFFN) else {}
    maps = {}
    for name, linear in layer.linears.items():
        weight, bias = propagated.get(name, linear.stored_base)
        maps[name] = (weight.base, None if bias is None else bias.base)
    return maps


def _fold(layer: ExpertFFN, into: ExpertFFN) -> None:
    """Set the experts and the router of a layer of the folded model; a base expert it has is set already."""
    into.router.load_state_dict(layer.router.state_dict())
    n, bases = layer.settings.experts, _bases(layer)
    alpha = layer.settings.alpha if into.settings.base else None
    # one-hot routing weights: E_m + alpha multiplier_i M_i tau_i
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
    """Return E_m + T_i from E_m + alpha T_i if alpha will be applied again; alpha 0 leaves no T_i."""
    if base is None or alpha in (None, 0.0, 1.0):
        return merged
    return base + (merged - base) / alpha


def _copy_lora(model: nn.Module, into: nn.Module) -> None:
    """Copy LoRA beside attention; a higher rank, shared with the experts, is filled with 0."""
    old: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    for path, layer in old.items():
        target: Any = into.get_submodule(path)
        for adapter, a in layer.lora_A.items():
            rank = a.weight.shape[0]
            target.lora_A[adapter].weight.zero_()[:rank] = a.weight
            target.lora_B[adapter].weight.zero_()[:, :rank] = layer.lora_B[adapter].weight
