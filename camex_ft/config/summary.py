"""A resolved configuration in a few lines, for `camex-ft validate` and the head of a run."""

from __future__ import annotations

from camex_ft.config.schema import Config, RoutingConfig
from camex_ft.utils.registry import PROTOCOLS


def summary(config: Config) -> dict[str, str]:
    """Return what a resolved configuration amounts to: heading -> a short text."""
    training, merging, protocol = config.training, config.merging, PROTOCOLS.get(config.merging.protocol)
    length = (
        f"{training.max_steps} steps" if training.max_steps > 0 else f"{training.num_train_epochs:g} epochs"
    )
    lines = {
        "task": ", ".join(filter(None, (config.task.id, config.task.summary))),
        "data": f"{config.data.source} {config.data.dir}"
        if config.data.source == "disk"
        else config.data.source,
        "backbone": config.backbone,
        "protocol": f"{protocol.name}: {protocol.summary}",
        "experts": f"{merging.experts}, top {merging.k}, in layers: {_layers(config)}",
        "merging": f"alpha {merging.alpha:g}" if protocol.base else "",
        "routing": _routing(config),
        "curvature": f"{merging.curvature.kind}, rank {merging.curvature.rank}" if protocol.curvature else "",
        "options": ", ".join(f"{name} {value}" for name, value in merging.options.items()),
        "training": f"{length}, batches of {training.per_device_train_batch_size}, learning rate "
        f"{training.learning_rate:g}, seed {training.seed}",
        "output": config.output.dir,
    }
    if protocol.form == "dense":
        lines["experts"] = lines["routing"] = ""
    return {heading: text for heading, text in lines.items() if text}


def _routing(config: Config) -> str:
    """Return what is not as by default."""
    given, plain = config.routing, RoutingConfig()
    keys = ("router", "temperature", "normalise", "z_loss")
    return ", ".join(
        f"{key} {getattr(given, key)}" for key in keys if getattr(given, key) != getattr(plain, key)
    )


def _layers(config: Config) -> str:
    layers = config.upcycle.layers
    return layers.replace("_", " ") if isinstance(layers, str) else ", ".join(map(str, layers))
