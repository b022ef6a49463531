"""Remarks on a configuration, for `camex-ft validate` and the head of a run.

summary   what it amounts to, in a few lines
changes   settings under which the upcycled model does not compute what the dense model computes
notes     keys that were written and have no effect
"""

from __future__ import annotations

from typing import Any

from camex_ft.config.identity import idle_routing_keys
from camex_ft.config.rules import CHOICE, mixture_of
from camex_ft.config.schema import (
    CHECKPOINTS,
    OWN_EXPERTS,
    Config,
    MergingConfig,
    RoutingConfig,
    UpcycleConfig,
)
from camex_ft.utils.registry import PROTOCOLS

START = "so that training starts from a changed function"


def summary(config: Config) -> dict[str, str]:
    """Summarise a resolved configuration: heading -> a short text."""
    training, merging, protocol = config.training, config.merging, PROTOCOLS.get(config.merging.protocol)
    length = (
        f"{training.max_steps} steps" if training.max_steps > 0 else f"{training.num_train_epochs:g} epochs"
    )
    layers = config.upcycle.layers
    layers = layers.replace("_", " ") if isinstance(layers, str) else ", ".join(map(str, layers))
    lines = {
        "task": ", ".join(filter(None, (config.task.id, config.task.summary))),
        "data": f"{config.data.source} {config.data.dir}"
        if config.data.source == "disk"
        else config.data.source,
        "backbone": config.backbone,
        "protocol": f"{protocol.name}: {protocol.summary}",
        "experts": f"{merging.experts}, top {merging.k}, in layers: {layers}",
        "merging": f"alpha {merging.alpha:g}" if protocol.base else "",
        "routing": _routing_of(config),
        "donors": _donors_of(config),
        "curvature": f"{merging.curvature.kind}, rank {merging.curvature.rank}" if protocol.curvature else "",
        "options": ", ".join(f"{name} {value}" for name, value in merging.options.items()),
        "training": f"{length}, batches of {training.per_device_train_batch_size}, learning rate "
        f"{training.learning_rate:g}, seed {training.seed}",
        "output": config.output.dir,
    }
    if protocol.form == "dense":
        lines["experts"] = lines["routing"] = ""
    return {heading: text for heading, text in lines.items() if text}


def _donors_of(config: Config) -> str:
    """Return the donors of the experts in words."""
    upcycle = config.upcycle
    if upcycle.init != CHECKPOINTS or config.merging.protocol == "dense":
        return ""
    each = f", {upcycle.each} experts from each" if upcycle.each > 1 else ""
    return f"{', '.join(upcycle.donors)}{each}; base: {upcycle.base}; other parameters: {upcycle.others}"


def _routing_of(config: Config) -> str:
    """Return the settings of routing that differ from their defaults."""
    routing, plain = config.routing, RoutingConfig()
    keys = ("init", "router", "temperature", "normalise", "z_loss")
    return ", ".join(
        f"{key} {getattr(routing, key)}" for key in keys if getattr(routing, key) != getattr(plain, key)
    )


def changes_of(config: Config) -> list[str]:
    """Return the reasons why a resolved configuration changes the function, as `changes` does."""
    known = mixture_of(config.backbone) if config.upcycle.init == OWN_EXPERTS else None
    return changes(config.merging, config.routing, config.upcycle, mixture=known[1] if known else None)


def changes(
    merging: MergingConfig, routing: RoutingConfig, upcycle: UpcycleConfig, *, mixture: Any = None
) -> list[str]:
    """Return the reasons, one sentence each, for sections with every default settled; none: the function is preserved.

    `init: noise` is not among them: how far it moves the experts is what its key says.

    Args:
        merging, routing, upcycle: the sections.
        mixture: routing of the backbone's mixtures, for `init: own-experts`; None where it is not known.
    """
    protocol = PROTOCOLS.get(merging.protocol)
    reasons: list[str] = []
    if protocol.form == "dense":
        return reasons
    own = upcycle.init == OWN_EXPERTS
    if own:
        reasons += _changes_of_mixture(routing, protocol, mixture)
    if protocol.form == "dynamic" and merging.alpha != 1:
        reasons.append(
            f"merging.alpha: {protocol.name} propagates the base expert from other layers, and "
            f"E_m + alpha * (E_i - E_m) is E_i at alpha = 1 alone; with {merging.alpha:g} every layer but "
            f"the first is mixed with another layer's weights, {START}"
        )
    scaled = protocol.form != "weights" or not protocol.base
    if not own and routing.normalise == "before" and merging.k < merging.experts and scaled:
        reasons.append(
            f"routing.normalise: before leaves routing weights of less than 1 in all to the {merging.k} of "
            f"{merging.experts} experts, and {protocol.name} scales with them, {START}"
        )
    if upcycle.init == "drop" and upcycle.drop > 0:
        reasons.append(f"upcycle.init: drop draws {upcycle.drop:.0%} of each expert's units anew, {START}")
    return reasons


def _changes_of_mixture(routing: RoutingConfig, protocol: Any, mixture: Any) -> list[str]:
    """Return the reasons why a mixture with own experts does not compute what the backbone's mixtures compute."""
    if protocol.form != "outputs":
        return [
            f"merging.protocol: {protocol.name} merges the weights of experts whose outputs the backbone's mixtures "
            f"mix, {START}; smoe computes what they compute"
        ]
    reasons = []
    if routing.router != "linear" or routing.temperature != 1:
        reasons.append(
            f"routing: the backbone's mixtures have a linear router of temperature 1, not {routing.router} of "
            f"{routing.temperature:g}, {START}"
        )
    if routing.init != "random":
        reasons.append(
            f"routing.init: {routing.init} takes the place of the routers of the backbone's mixtures, {START}"
        )
    if mixture is not None and routing.normalise != mixture.normalise:
        reasons.append(
            f"routing.normalise: {routing.normalise}, and the backbone's mixtures normalise {mixture.normalise} the "
            f"choice of experts, {START}"
        )
    return reasons


def notes(config: Config) -> list[str]:
    """Return remarks on keys that were written, differ from their default and have no effect beside the others."""
    written, default = config.model_dump(exclude_unset=True), Config()
    merging, remarks = written.get("merging", {}), []
    entry = PROTOCOLS.get(config.merging.protocol)
    protocol = f"protocol '{entry.name}'"
    if (
        not entry.curvature
        and merging.get("curvature")
        and config.merging.curvature != default.merging.curvature
    ):
        remarks.append(f"merging.curvature has no effect: {protocol} has no curvature")
    if not entry.base and "alpha" in merging and config.merging.alpha != default.merging.alpha:
        remarks.append(f"merging.alpha has no effect: {protocol} has no base expert")
    remarks += _idle_routing(config, written.get("routing", {}))
    for key in ("noise", "drop"):
        value = getattr(config.upcycle, key)
        if (
            config.upcycle.init != key
            and key in written.get("upcycle", {})
            and value != getattr(default.upcycle, key)
        ):
            remarks.append(f"upcycle.{key} has no effect with upcycle.init: {config.upcycle.init}")
    remarks += _idle_donors(config)
    if config.data.dir is not None and config.data.source not in ("auto", "disk"):
        remarks.append(f"data.dir has no effect with data.source: {config.data.source}")
    return remarks


def _idle_donors(config: Config) -> list[str]:
    """Return remarks on keys about donors without effect."""
    upcycle, plain = config.upcycle, UpcycleConfig()
    changed = [k for k in upcycle.model_fields_set if getattr(upcycle, k) != getattr(plain, k)]
    if upcycle.init != CHECKPOINTS:
        idle = [key for key in ("each", "base", "others", "others_scale") if key in changed]
        return [f"upcycle.{key} has no effect with upcycle.init: {upcycle.init}" for key in idle]
    remarks = []
    if "others_scale" in changed and upcycle.others not in ("arithmetic", "ties"):
        remarks.append(f"upcycle.others_scale has no effect with upcycle.others: {upcycle.others}")
    if "base" in changed and not PROTOCOLS.get(config.merging.protocol).base and config.tuning.mode != "lora":
        remarks.append(f"upcycle.base has no effect: protocol '{config.merging.protocol}' has no base expert")
    return remarks


def _idle_routing(config: Config, written: dict[str, Any]) -> list[str]:
    """Return remarks on keys of `routing` without effect."""
    if PROTOCOLS.get(config.merging.protocol).form == "dense":
        return []
    default = Config().routing
    changed = [key for key in written if getattr(config.routing, key) != getattr(default, key)]
    idle = idle_routing_keys(config)
    remarks = [f"routing.{key} has no effect: {idle[key]}" for key in changed if idle.get(key)]
    if config.routing.init == "random" and config.routing.fit != default.fit:
        remarks.append("routing.fit has no effect with routing.init: random")
    if config.routing.router == CHOICE and config.merging.k >= config.merging.experts:
        remarks.append(
            "routing.router: expert-choice chooses nothing, since every expert takes every token; set merging.top_k "
            "below merging.experts"
        )
    if config.routing.router == CHOICE and "balance" in changed:
        remarks.append("routing.balance has no effect: experts that choose tokens have equal loads")
    return remarks
