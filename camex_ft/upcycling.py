"""Upcycling: a backbone's dense feed-forward layers become experts, and the function that it computes stays the same.

    dense model --copy--> model --restructure (chosen layers -> MergedFFN or MixtureFFN)--> upcycled model

What was done is kept in the model's own config, under ``camex``, so that `load` finds it in a saved checkpoint.
Source: sparse upcycling, Komatsuzaki et al. 2023 (arXiv 2212.05055), as CAMEx uses it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from camex_ft.backbones import DenseFFN, calls, family_of, generates, select_layers
from camex_ft.config import MergingConfig, RoutingConfig, UpcycleConfig, changes
from camex_ft.config.schema import Section
from camex_ft.errors import FunctionChanged, UserError
from camex_ft.moe.context import RoutingContext
from camex_ft.moe.experts import LayerSettings
from camex_ft.moe.ffn import ExpertFFN, MergedFFN, MixtureFFN
from camex_ft.moe.granularity import Granularity, Grouping
from camex_ft.moe.link import chains, continues
from camex_ft.moe.perturb import add_noise, drop_units
from camex_ft.moe.routing import RouterSettings
from camex_ft.protocols import Protocol
from camex_ft.registry import PROTOCOLS

KEY = "camex"
Options = TypeVar("Options", bound=Section)
Layer = TypeVar("Layer", bound=ExpertFFN)


def upcycle(
    model: PreTrainedModel,
    *,
    merging: MergingConfig | Mapping[str, Any] | None = None,
    routing: RoutingConfig | Mapping[str, Any] | None = None,
    upcycle: UpcycleConfig | Mapping[str, Any] | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Return a copy of `model` whose chosen feed-forward layers have experts; `model` itself is left as it is.

    With ``init: copy`` (the default) every expert and the base start as the dense layer, so the copy computes what
    `model` computes.

    Args:
        model: a transformers model of a known family, with any head.
        merging, routing, upcycle: sections of the configuration, or mappings as in YAML.
        seed: of the new parameters; the global random state stays as it is.

    Raises:
        UserError: `model` has experts already, its family is unknown, or the settings do not fit it or each other.
    """
    if getattr(model.config, KEY, None) is not None:
        raise UserError(f"{type(model).__name__} has experts already: upcycle the dense model it came from")
    plan = _plan({"merging": merging, "routing": routing, "upcycle": upcycle})
    for reason in changes(*plan):
        warnings.warn(reason, FunctionChanged, stacklevel=2)
    made = copy.deepcopy(model)
    if PROTOCOLS.get(plan.merging.protocol).form == "dense":
        return made
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _restructure(made, plan)
        _set_apart(made, plan.upcycle)
    setattr(made.config, KEY, {k: section.model_dump(mode="json") for k, section in plan._asdict().items()})
    return made


def load(path: str | Path) -> PreTrainedModel:
    """Return the model of a checkpoint folder: upcycled where its config says so, else dense; in evaluation mode.

    Raises:
        UserError: the folder holds no checkpoint, or one that does not fit its own config.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a checkpoint folder: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        plain = getattr(transformers, (config.architectures or ["none"])[0])
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: its config.json is not usable: {str(error).splitlines()[0]}") from error
    try:
        loaded: Any = _with_experts(plain).from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, by name
        )
    except UserError:
        raise
    except Exception as error:  # safetensors, transformers and the file system each raise their own
        raise UserError(f"{folder}: its weights cannot be read: {str(error).splitlines()[0]}") from error
    model, info = loaded
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *(k[0] for k in info["mismatched_keys"])]
    if wrong:
        raise UserError(
            f"{folder}: the checkpoint is incomplete or of another model: {len(wrong)} weights do not "
            f"match, such as {sorted(wrong)[0]}"
        )
    made: PreTrainedModel = model.eval()
    return made


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


class Plan(NamedTuple):
    """What upcycling does, as the configuration's sections say it."""

    merging: MergingConfig
    routing: RoutingConfig
    upcycle: UpcycleConfig


def _plan(sections: Mapping[str, Any]) -> Plan:
    return Plan(
        _section(MergingConfig, sections.get("merging")),
        _section(RoutingConfig, sections.get("routing")),
        _section(UpcycleConfig, sections.get("upcycle")),
    )


def _section(kind: type[Options], given: Any) -> Options:
    if isinstance(given, kind):
        return given
    try:
        return kind.model_validate(dict(given or {}))
    except ValueError as error:
        raise UserError(f"{kind.__name__}: {error}") from error


def _with_experts(plain: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return `plain` with a constructor that restructures the new model as its config's ``camex`` entry says."""

    def make(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, config, *args, **kwargs)
        saved = getattr(config, KEY, None)
        if saved is not None:
            _restructure(self, _plan(saved))

    # the name stays, since `architectures` in a saved config is made from it
    return type(plain.__name__, (plain,), {"__init__": make, "__module__": plain.__module__})


def _restructure(model: PreTrainedModel, plan: Plan) -> None:
    """Give the chosen layers of `model` experts, in place."""
    family = family_of(model)
    merging, routing = plan.merging, plan.routing
    protocol: Protocol = PROTOCOLS.get(merging.protocol)
    if merging.k > merging.experts or merging.experts < 2:
        raise UserError(
            f"merging: experts is {merging.experts} and top_k is {merging.k}: expected at least 2 experts and a top_k "
            "of at most as many"
        )
    context = RoutingContext(partial(calls.read_pass, family), calls.write_state)
    chosen = select_layers(family.ffns(model), plan.upcycle.layers)
    last: dict[str, MergedFFN] = {}  # of each stack
    for ffn in chosen:
        grouping = Grouping(
            granularity=granularity_of(protocol, routing, stack=ffn.stack, model=model),
            segment=routing.segment,
            first_segment=routing.first_segment,
        )
        settings = LayerSettings(
            rule=protocol.bind(merging.options),
            experts=merging.experts,
            top_k=merging.k,
            base=protocol.base,
            rank=merging.curvature.rank if protocol.curvature else 0,
            curvature=merging.curvature.kind,
            alpha=merging.alpha,
            noise=routing.noise,
            balance=routing.balance,
            grouping=grouping,
            router=RouterSettings(
                kind=routing.router,
                temperature=routing.temperature,
                normalise=routing.normalise,
                z_loss=routing.z_loss,
            ),
            keep_vectors=merging.keep_vectors,
        )
        if protocol.form == "outputs":
            _replace(model, ffn, partial(MixtureFFN, context=context, settings=settings))
            continue
        before = last.get(ffn.stack) if protocol.form == "dynamic" else None
        previous = before if before is not None and continues(before.linears, ffn.weights) else None
        made = partial(MergedFFN, context=context, settings=settings, previous=previous)
        last[ffn.stack] = _replace(model, ffn, made)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            context.attach(module)
    if getattr(model.config, "is_encoder_decoder", False):
        context.attach_encoder(model.get_encoder())


def granularity_of(
    protocol: Protocol, routing: RoutingConfig, *, stack: str, model: PreTrainedModel
) -> Granularity:
    """Return the granularity of one stack's layers, with `auto` decided.

    Raises:
        UserError: the protocol does not allow it, or it would let a token that generates see its future.
    """
    causal = stack == "decoder" and generates(model)
    both = getattr(model.config, "is_encoder_decoder", False)
    _check_choice(protocol, routing, causal=causal, model=model)
    wanted: str = routing.granularity
    if wanted == "encoder" and not both:
        raise UserError(
            f"routing.granularity: encoder needs a backbone with an encoder and a decoder; {_name(model)} has one stack"
        )
    if wanted in ("auto", "encoder"):
        if "sequence" not in protocol.granularities:
            wanted = protocol.granularities[0]
        elif stack == "decoder" and both and (causal or wanted == "encoder"):
            wanted = "encoder"
        else:
            wanted = "segment" if causal else "sequence"
    if wanted not in protocol.granularities:
        raise UserError(
            f"routing.granularity: {protocol.name} does not allow {wanted}; "
            f"it allows {', '.join(protocol.granularities)}"
        )
    if wanted == "sequence" and causal:
        raise UserError(
            f"routing.granularity: sequence would let tokens of {_name(model)}, which generates, be routed by their "
            "future; use auto, segment or token"
        )
    return cast(Granularity, wanted)


def _check_choice(
    protocol: Protocol, routing: RoutingConfig, *, causal: bool, model: PreTrainedModel
) -> None:
    if routing.router != "expert-choice":
        return
    if protocol.form != "outputs":
        raise UserError(
            f"routing.router: expert-choice lets experts take tokens, and {protocol.name} merges weights: use it with "
            "smoe, or linear or cosine"
        )
    if causal:
        raise UserError(
            f"routing.router: expert-choice would let tokens of {_name(model)}, which generates, be routed by their "
            "future: an expert takes the best tokens of a whole sequence; use linear or cosine"
        )


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__


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
    model.set_submodule(ffn.path, layer)
    for path in ffn.silence:
        model.set_submodule(path, nn.Identity())
    return layer


def _set_apart(model: nn.Module, given: UpcycleConfig) -> None:
    """Make the experts differ as ``init`` says; only when a model is upcycled, not when a saved one is built again."""
    layers = expert_layers(model).values()
    if given.init == "noise":
        add_noise(layers, given.noise)
    elif given.init == "drop":
        drop_units(layers, given.drop)
