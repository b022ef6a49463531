"""Upcycling: a backbone's dense feed-forward layers become experts, and the function that it computes stays the same.

    dense model --copy--> model --restructure (chosen layers -> MergedFFN or MixtureFFN)--> upcycled model
    upcycled model --save--> a folder --load--> upcycled model             low-rank experts alone: `adapters`

What was done is kept in the model's own config, under ``camex``, so that `load` finds it in a saved checkpoint.
Source: sparse upcycling, Komatsuzaki et al. 2023 (arXiv 2212.05055), as CAMEx uses it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from camex_ft.config import Config, MergingConfig, RoutingConfig, TuningConfig, UpcycleConfig, changes
from camex_ft.errors import FunctionChanged, UserError
from camex_ft.registry import PROTOCOLS
from camex_ft.upcycling import adapters
from camex_ft.upcycling.adapters import restore, save, trained_state
from camex_ft.upcycling.granularities import granularity_of
from camex_ft.upcycling.layers import (
    base_chains,
    caches,
    expert_layers,
    freeze,
    keep_nothing,
    routing_context,
)
from camex_ft.upcycling.restructuring import LORA, Plan, plan_of, restructure, set_apart

__all__ = [
    "base_chains",
    "caches",
    "expert_layers",
    "for_run",
    "freeze",
    "granularity_of",
    "keep_nothing",
    "load",
    "restore",
    "routing_context",
    "save",
    "trained_state",
    "upcycle",
]
KEY = adapters.KEY


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
    _build(made, plan, seed)
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


def _build(made: PreTrainedModel, plan: Plan, seed: int) -> None:
    """Do what the plan says, in place, and keep it in the model's config."""
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


def load(path: str | Path, *, backbone: PreTrainedModel | str | None = None) -> PreTrainedModel:
    """Return the model of a checkpoint folder: upcycled where its config says so, else dense; in evaluation mode.

    Args:
        path: the folder, a whole checkpoint or an adapter.
        backbone: of an adapter, the dense model it belongs on or where that is; None: the one it names.

    Raises:
        UserError: the folder holds no checkpoint, or one that does not fit its own config, or an adapter whose backbone
            is not there or another one.
    """
    folder = Path(path)
    if adapters.is_adapter(folder):
        return _with_adapter(folder, backbone)
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


def _with_adapter(folder: Path, backbone: PreTrainedModel | str | None) -> PreTrainedModel:
    """Return an adapter's model: its backbone made again, restructured, with what was trained put in."""
    about = adapters.read(folder)
    model = copy.deepcopy(backbone) if isinstance(backbone, PreTrainedModel) else about.dense(backbone)
    _build(_with_dtype(model, about.dtype), plan_of(about.plan), seed=about.seed)
    about.check(model)
    restore(model, folder)
    return model.eval()


def _with_dtype(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    made: PreTrainedModel = model if model.dtype == dtype else model.to(dtype)
    return made


def _with_experts(plain: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return `plain` with a constructor that restructures the new model as its config's ``camex`` entry says."""

    def make(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, config, *args, **kwargs)
        saved = getattr(config, KEY, None)
        if saved is not None:
            restructure(self, plan_of(saved))

    # the name stays, since `architectures` in a saved config is made from it
    return type(plain.__name__, (plain,), {"__init__": make, "__module__": plain.__module__})
