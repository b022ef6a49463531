"""The two ways to a model with experts: `upcycle` a dense one, `load` a saved one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from camex_ft.config import Config, MergingConfig, RoutingConfig, TuningConfig, UpcycleConfig, changes
from camex_ft.config.schema import CHECKPOINTS
from camex_ft.upcycling import adapters
from camex_ft.upcycling.donor_experts import Donors
from camex_ft.upcycling.freezing import freeze
from camex_ft.upcycling.model_classes import (
    build,
    check_weights,
    class_named,
    register_families,
    with_adapter,
    wrong_weights,
)
from camex_ft.upcycling.own_experts import routing_of, settle_own_experts
from camex_ft.upcycling.plan import KEY, Plan, plan_of, written_by
from camex_ft.utils.errors import FunctionChanged, UserError
from camex_ft.utils.folders import unsafe


def upcycle(
    model: PreTrainedModel,
    *,
    merging: MergingConfig | Mapping[str, Any] | None = None,
    routing: RoutingConfig | Mapping[str, Any] | None = None,
    upcycle: UpcycleConfig | Mapping[str, Any] | None = None,
    tuning: TuningConfig | Mapping[str, Any] | None = None,
    donors: Sequence[PreTrainedModel | str | Path] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    in_place: bool = False,
) -> PreTrainedModel:
    """Return a copy of `model` whose chosen feed-forward layers have experts; `model` itself is left as it is.

    With ``init: copy`` (the default) every expert and the base start as the dense layer, so the copy computes what
    `model` computes. A sparse mixture starts with ``init: own-experts``: its routed experts become those of the layers.

    Args:
        model: a transformers model of a known family, with any head.
        merging, routing, upcycle, tuning: sections of the configuration, or mappings as in YAML. With ``mode: lora``
            experts are of low rank, attention gets LoRA, and the rest is frozen; in other modes `freeze` chooses.
        donors: fine-tuned from `model`, to become the experts: dense models of its class, or checkpoints as in
            ``upcycle.from``, in whose place they are. They set `merging.experts`.
        tokenizer: of `model`, whose vocabulary the donors have to have; None: not compared.
        seed: of the new parameters; the global random state stays as it is.
        in_place: take over the modules of `model`, without the memory of a copy; `model` is not to be used any more.

    Raises:
        UserError: `model` was upcycled already, its family is unknown, or the settings do not fit it or each other; a
            donor is not there, or no donor of `model`.
    """
    if getattr(model.config, KEY, None) is not None:
        raise UserError(f"{type(model).__name__} has experts already: upcycle the dense model it came from")
    plan = plan_of({"merging": merging, "routing": routing, "upcycle": upcycle, "tuning": tuning})
    models = [str(donor) if isinstance(donor, Path) else donor for donor in donors or plan.upcycle.donors]
    if donors or plan.upcycle.init == CHECKPOINTS:
        plan = _with_donors(plan, len(models))
    plan = settle_own_experts(plan, model)
    for reason in changes(plan.merging, plan.routing, plan.upcycle, mixture=routing_of(model)):
        warnings.warn(reason, FunctionChanged, stacklevel=2)
    model = model if in_place else copy.deepcopy(model)
    if plan.upcycle.init != CHECKPOINTS or model.device.type == "meta":
        return build(model, plan, seed)
    return build(model, plan, seed, Donors.of(model, models, plan.upcycle, tokenizer))


def _with_donors(plan: Plan, count: int) -> Plan:
    """Return the plan of a model with donors: their experts are all of its experts."""
    upcycle = plan.upcycle.model_copy(update={"init": CHECKPOINTS})
    experts = count * upcycle.each
    if experts < 2:
        raise UserError("upcycle.from: expected donors for at least 2 experts")
    if "experts" in plan.merging.model_fields_set and plan.merging.experts != experts:
        raise UserError(
            f"merging.experts: {count} donors give {experts} experts, got {plan.merging.experts}: leave it out, or set "
            "upcycle.each"
        )
    return plan._replace(upcycle=upcycle, merging=plan.merging.model_copy(update={"experts": experts}))


def for_run(
    settled: Config,
    dense: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    in_place: bool = False,
) -> PreTrainedModel:
    """Return the model that a run trains: `dense` upcycled and frozen as its resolved configuration says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FunctionChanged)  # said among the configuration's remarks
        model = upcycle(
            dense,
            merging=settled.merging,
            routing=settled.routing,
            upcycle=settled.upcycle,
            tuning=settled.tuning,
            tokenizer=tokenizer,
            seed=settled.training.seed,
            in_place=in_place,
        )
    freeze(model, settled.tuning.mode)
    return model


def load(
    path: str | Path, *, backbone: PreTrainedModel | str | None = None, revision: str | None = None
) -> PreTrainedModel:
    """Return the model of a checkpoint folder: upcycled where its config says so, else dense; in evaluation mode.

    Args:
        path: the folder, a whole checkpoint or an adapter; or its id on the hub, NAME/MODEL, where there is no folder
            of that name: it is downloaded into the hub cache. A `Path` is always a folder.
        backbone: of an adapter, the dense model it belongs on or where that is; None: the one it names.
        revision: of an id on the hub: a branch, tag or commit.

    Raises:
        UserError: the folder holds no checkpoint, or one that does not fit its own config, is of a newer version or not
            safe to read, or an adapter whose backbone is not there or another one; the hub has no such model, or cannot
            be asked.
    """
    register_families()
    folder = Path(path)
    if not str(path):
        raise UserError("there is no folder '': expected that of a model, or an id on the hub, NAME/MODEL")
    if not folder.is_dir() and isinstance(path, str) and adapters.is_hub_id(path):
        folder = adapters.fetch(path, revision=revision)
    elif not folder.exists():
        raise UserError(
            f"there is no folder {path}: expected that of a model, or an id on the hub, NAME/MODEL"
        )
    why = unsafe(folder) if folder.is_dir() else None
    if why:
        raise UserError(f"{folder}: {why}")
    if adapters.is_adapter(folder):
        return with_adapter(folder, backbone)
    if not (folder / "config.json").is_file():
        near = f": did you mean {folder / 'model'}?" if (folder / "model" / "config.json").is_file() else ""
        raise UserError(f"{folder} is not a checkpoint folder: it has no config.json{near}")
    config, kind = _described(folder)
    saved = getattr(config, KEY, None)
    by = f" (it was {written_by(saved)})" if saved is not None else ""
    dense: dict[str, Any] = (
        {} if saved is not None else {"ignore_mismatched_sizes": True}
    )  # they are reported below, by name
    try:
        loaded: Any = kind.from_pretrained(
            folder, config=config, use_safetensors=True, dtype="auto", output_loading_info=True, **dense
        )
    except UserError:
        raise
    except Exception as error:  # safetensors, transformers and the file system each raise their own
        raise UserError(
            f"{folder}: its weights cannot be read: {_first_line(error)}{by}. Expected the files as they were written: "
            "copy the folder again, or take another checkpoint"
        ) from error
    model: PreTrainedModel
    model, info = loaded
    check_weights(folder, wrong_weights(model, info))
    return model.eval()


def _described(folder: Path) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """Return the configuration in a folder and the class of its model."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here; each one is about the file's content
        raise UserError(f"{folder}: its config.json is not usable: {_first_line(error)}") from error
    named = config.architectures or ["none"]
    kind = class_named(str(named[0]))
    if kind is None:
        raise UserError(
            f"{folder}: its config.json is not usable: transformers has no model {named[0]!r:.80}"
        )
    return config, kind


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
