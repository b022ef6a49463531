"""Models with experts made from dense ones: a copy restructured as the configuration says, under a class of its own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from camex_ft.config import Config, MergingConfig, RoutingConfig, TuningConfig, UpcycleConfig, changes
from camex_ft.upcycling import adapters
from camex_ft.upcycling.classes import adopt
from camex_ft.upcycling.entry import KEY
from camex_ft.upcycling.layers import freeze
from camex_ft.upcycling.restructuring import LORA, Plan, plan_of, restructure, set_apart
from camex_ft.utils.errors import FunctionChanged, UserError
from camex_ft.utils.registry import PROTOCOLS


def upcycle(
    model: PreTrainedModel,
    *,
    merging: MergingConfig | Mapping[str, Any] | None = None,
    routing: RoutingConfig | Mapping[str, Any] | None = None,
    upcycle: UpcycleConfig | Mapping[str, Any] | None = None,
    tuning: TuningConfig | Mapping[str, Any] | None = None,
    seed: int = 0,
    in_place: bool = False,
) -> PreTrainedModel:
    """Return a copy of `model` whose chosen feed-forward layers have experts; `model` itself is left as it is.

    With ``init: copy`` (the default) every expert and the base start as the dense layer, so the copy computes what
    `model` computes.

    Args:
        model: a transformers model of a known family, with any head.
        merging, routing, upcycle, tuning: sections of the configuration, or mappings as in YAML. With ``mode: lora``
            experts are of low rank, attention gets LoRA, and the rest is frozen; in other modes `freeze` chooses.
        seed: of the new parameters; the global random state stays as it is.
        in_place: change `model` and return it, without the memory of a copy.

    Raises:
        UserError: `model` has experts already, its family is unknown, or the settings do not fit it or each other.
    """
    if getattr(model.config, KEY, None) is not None:
        raise UserError(f"{type(model).__name__} has experts already: upcycle the dense model it came from")
    plan = plan_of({"merging": merging, "routing": routing, "upcycle": upcycle, "tuning": tuning})
    for reason in changes(plan.merging, plan.routing, plan.upcycle):
        warnings.warn(reason, FunctionChanged, stacklevel=2)
    made = model if in_place else copy.deepcopy(model)
    build(made, plan, seed)
    return made


def for_run(settled: Config, dense: PreTrainedModel, *, in_place: bool = False) -> PreTrainedModel:
    """Return the model that a run trains: `dense` upcycled and frozen as its resolved configuration says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FunctionChanged)  # said among the configuration's remarks
        model = upcycle(
            dense,
            merging=settled.merging,
            routing=settled.routing,
            upcycle=settled.upcycle,
            tuning=settled.tuning,
            seed=settled.training.seed,
            in_place=in_place,
        )
    freeze(model, settled.tuning.mode)
    return model


def build(made: PreTrainedModel, plan: Plan, seed: int) -> None:
    """Do what the plan says, in place, keep it in the model's config, and give the model its class."""
    lora = plan.tuning.mode == LORA
    if PROTOCOLS.get(plan.merging.protocol).form == "dense" and not lora:
        return
    dtype = made.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        restructure(made, plan)
        set_apart(made, plan.upcycle)
    kept: dict[str, Any] = plan.sections()
    if lora:
        freeze(made, LORA)
        kept[adapters.BACKBONE] = adapters.source_of(made, seed=seed, dtype=dtype)
    setattr(made.config, KEY, kept)
    adopt(made)
