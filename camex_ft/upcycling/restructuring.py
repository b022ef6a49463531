"""Replace chosen feed-forward layers of a model by layers with experts, in place, as the plan says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from camex_ft.backbones import DenseFFN, SparseFFN, family_of, forward_state, select_layers
from camex_ft.moe.config import LayerSettings
from camex_ft.moe.context import RoutingContext
from camex_ft.moe.layers.ffn import ExpertFFN, MergedFFN, MixtureFFN
from camex_ft.moe.layers.low_rank_expert_linear import LowRank
from camex_ft.moe.layers.propagation import continues
from camex_ft.moe.routing.router import Grouping, RouterSettings
from camex_ft.protocols import Protocol
from camex_ft.upcycling.freezing import add_lora
from camex_ft.upcycling.own_experts import settle_own_experts, start_from_mixture
from camex_ft.upcycling.plan import LORA, Plan, granularity_of
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import PROTOCOLS

Layer = TypeVar("Layer", bound=ExpertFFN)


def restructure(model: PreTrainedModel, plan: Plan) -> None:
    """Give the chosen layers of `model` experts, and its attention LoRA where the plan says so, in place.

    Raises:
        UserError: the plan does not fit the model, or its parts each other.
    """
    protocol: Protocol = PROTOCOLS.get(plan.merging.protocol)
    dense = protocol.form == "dense"
    ffns = family_of(model).ffns(model) if dense else []
    if not dense:
        _add_experts(model, protocol, plan)
    if plan.tuning.mode == LORA:
        add_lora(model, plan.tuning.lora, ffns)


def _add_experts(model: PreTrainedModel, protocol: Protocol, plan: Plan) -> None:
    """Give the chosen layers experts, whole ones or of low rank."""
    family = family_of(model)
    plan = settle_own_experts(plan, model)
    merging, low_rank = plan.merging, None
    if plan.tuning.mode == LORA:
        lora = plan.tuning.lora
        low_rank = LowRank(rank=lora.rank, scale=lora.scale, dropout=lora.dropout)
    elif plan.upcycle.rank is not None:
        low_rank = LowRank(rank=plan.upcycle.rank)
    if merging.k > merging.experts or merging.experts < 2:
        raise UserError(
            f"merging: experts is {merging.experts} and top_k is {merging.k}: expected at least 2 experts and a top_k "
            "of at most as many"
        )
    context = RoutingContext(partial(forward_state.read_call, family), forward_state.write_router_state)
    chosen = select_layers(family.ffns(model), plan.upcycle.layers)
    last: dict[str, MergedFFN] = {}  # of each stack
    for ffn in chosen:
        settings = _settings(model, ffn.stack, protocol, plan)
        if protocol.form == "outputs":
            _replace(model, ffn, partial(MixtureFFN, context=context, settings=settings, low_rank=low_rank))
            continue
        before = last.get(ffn.stack) if protocol.form == "dynamic" else None
        previous = before if before is not None and continues(before.linears, ffn.weights) else None
        layer = partial(MergedFFN, context=context, settings=settings, previous=previous, low_rank=low_rank)
        last[ffn.stack] = _replace(model, ffn, layer)
    if family.routing is not None and getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False  # transformers would look for routers that are replaced
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            context.attach(module)
    if getattr(model.config, "is_encoder_decoder", False):
        context.attach_encoder(model.get_encoder())


def _settings(model: PreTrainedModel, stack: str, protocol: Protocol, plan: Plan) -> LayerSettings:
    """Return the settings of one stack's layers."""
    merging, routing = plan.merging, plan.routing
    return LayerSettings(
        rule=protocol.bind(merging.options),
        experts=merging.experts,
        top_k=merging.k,
        base=protocol.base,
        rank=merging.curvature.rank if protocol.curvature else 0,
        curvature=merging.curvature.kind,
        alpha=merging.alpha,
        noise=routing.noise,
        balance=routing.balance,
        grouping=Grouping(
            granularity=granularity_of(protocol, routing, stack=stack, model=model),
            segment=routing.segment,
            first_segment=routing.first_segment,
        ),
        router=RouterSettings(
            kind=routing.router,
            temperature=routing.temperature,
            normalise=routing.normalise,
            z_loss=routing.z_loss,
            intercept=routing.init == "fit",
        ),
        keep_vectors=merging.keep_vectors,
    )


def _replace(model: PreTrainedModel, ffn: DenseFFN, kind: Callable[..., Layer]) -> Layer:
    layer = kind(
        ffn.weights,
        copy.deepcopy(ffn.activation),
        name=ffn.path,
        stack=ffn.stack,
        inner_dropout=ffn.inner_dropout,
        outer_dropout=ffn.outer_dropout,
    )
    layer.train(model.training)
    if isinstance(ffn, SparseFFN):
        start_from_mixture(model, layer, ffn)
        model.set_submodule(ffn.path, layer)
        return layer
    model.set_submodule(ffn.path, layer)
    for path in ffn.silence:
        model.set_submodule(path, nn.Identity())
    return layer
