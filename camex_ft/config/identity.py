"""A configuration as text, and the short hash by which the same experiment is found again."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from camex_ft.config import training_arguments
from camex_ft.config.backbones import NEW
from camex_ft.config.needs import local_backbone
from camex_ft.config.reading import Dumper
from camex_ft.config.rules import CHOICE
from camex_ft.config.schema import BASES, CHECKPOINTS, Config, RoutingConfig, TrainingConfig
from camex_ft.utils.registry import PROTOCOLS

# Keys of `training` that do not change a result; `tests/training/test_fields.py` tries each.
WITHOUT_EFFECT = {
    # what is logged, and where
    *("logging_steps", "logging_strategy", "logging_first_step", "logging_nan_inf_filter", "log_level"),
    *("log_level_replica", "log_on_each_node", "disable_tqdm", "report_to", "run_name", "project"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "skip_memory_metrics"),
    *("include_num_input_tokens_seen", "include_for_metrics"),
    # checkpoints
    *("resume", "save_total_limit", "save_on_each_node", "save_only_model"),
    *("restore_callback_states_from_checkpoint", "enable_jit_checkpoint"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
    # how rows are loaded and evaluated
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("per_device_eval_batch_size", "eval_accumulation_steps", "eval_use_gather_object"),
    # memory, and how processes talk to each other
    "torch_empty_cache_steps",
    *("ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters"),
    *("ddp_static_graph", "ddp_timeout"),
}


PLAIN = RoutingConfig()
LOGGED = TrainingConfig().logging_steps


def idle_routing_keys(config: Config) -> dict[str, str]:
    """Return of each further key of `routing` why it has no effect beside the others, or "" where it has one."""
    routing, merging = config.routing, config.merging
    every = merging.k >= merging.experts
    one = merging.k == 1 and routing.router != CHOICE and (routing.normalise == "after" or every)
    return {
        "router": "",
        "temperature": "one expert has the weight 1 with merging.top_k: 1" if one else "",
        "normalise": "all experts are chosen with merging.top_k at merging.experts" if every else "",
        "z_loss": "",
    }


def to_yaml(config: Config) -> str:
    """Return every key of `config` in YAML, in the order of the schema; `load_config` reads the same back."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def config_hash(config: Config, *, data: str = "", backbone: str = "", start: str = "") -> str:
    """Return 8 hexadecimal digits that are the same for the same experiment.

    Left out are keys without effect on the result: curvature for a protocol that has none, everything about experts for
    `dense`, logging, and the like. Paths count as long as nothing takes their place: of a data folder its last name, of
    a local backbone its real path.

    Args:
        config: a resolved configuration.
        data: a fingerprint of the data, such as their SHA-256; takes the place of the data folder's name.
        backbone: the SHA-256 of the backbone's content, and of the donors of its experts; takes the place of its name,
            but for a leading ``new:``.
        start: a fingerprint of the checkpoint that `training.resume` names, where it is another run's.
    """
    values = config.model_dump(mode="json")
    _drop_paths(values, config, data, backbone)
    _drop_idle_keys(values, config)
    if start:
        values["training"]["resume"] = start
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def folder_label(path: Path | str) -> str:
    """Return what a local backbone is called: its folder's name, or of a run's model, ``run-`` and the run's hash."""
    folder = Path(path)
    run = re.search(r"--([0-9a-f]{8})$", folder.parent.name)
    return f"run-{run.group(1)}" if run and folder.name == "model" else folder.name


def hash_by_name(config: Config, *, data: str) -> str:
    """Return the hash of runs whose record does not have the content of their backbone: its name counts, of a path the
    last part."""
    local = local_backbone(config.backbone)
    return config_hash(config, data=data, backbone="" if local is None else folder_label(local))


def _drop_paths(values: dict[str, Any], config: Config, data: str, content: str) -> None:
    del values["output"]
    folder = config.data.path if config.data.source == "disk" else None
    values["data"]["dir"] = data or (folder.name if folder is not None else None)
    backbone = local_backbone(config.backbone)
    if content or backbone is not None:
        new = NEW if config.backbone.startswith(NEW) else ""
        values["backbone"] = new + (content or os.path.realpath(str(backbone)))
    if config.routing.init == "fit" and not isinstance(config.routing.fit.sources, str):
        values["routing"]["fit"]["from"] = [Path(place).name for place in config.routing.fit.sources]
    if config.upcycle.init == CHECKPOINTS:
        upcycle, count = values["upcycle"], len(config.upcycle.donors)
        # the digest of the backbone's content includes theirs
        upcycle["from"] = count if content else [_real_path(donor) for donor in config.upcycle.donors]
        if config.upcycle.base not in BASES:
            upcycle["base"] = "checkpoint" if content else _real_path(config.upcycle.base)


def _real_path(spec: str) -> str:
    local = local_backbone(spec)
    return spec if local is None else os.path.realpath(local)


def _drop_idle_keys(values: dict[str, Any], config: Config) -> None:
    protocol = PROTOCOLS.get(config.merging.protocol)
    del values["task"]["predict"]
    values["task"] |= config.task.implied()
    values["data"]["splits"] = {split: name for split, name in config.data.splits.items() if split != name}
    if not values["data"]["splits"]:
        del values["data"]["splits"]
    if config.data.source != "embedded":
        del values["data"]["seed"]
    if not protocol.curvature:
        del values["merging"]["curvature"], values["training"]["curvature_learning_rate"]
    elif config.merging.curvature.kind == "kronecker":  # as before there were others
        del values["merging"]["curvature"]["kind"]
    if not protocol.base:
        del values["merging"]["alpha"]
    for key in ("noise", "drop"):
        if config.upcycle.init != key:
            del values["upcycle"][key]
    if config.upcycle.init == CHECKPOINTS and config.upcycle.others not in ("arithmetic", "ties"):
        del values["upcycle"]["others_scale"]
    if config.routing.granularity in ("sequence", "token", "encoder"):
        del values["routing"]["segment"], values["routing"]["first_segment"]
    for key, idle in idle_routing_keys(config).items():
        if idle or getattr(config.routing, key) == getattr(PLAIN, key):  # as before there were such keys
            del values["routing"][key]
    if config.routing.router == CHOICE:  # balanced as it is made
        del values["routing"]["balance"]
    values["merging"]["top_k"] = config.merging.k
    if not protocol.random:  # vectors that are kept are those that would be made
        del values["merging"]["keep_vectors"]
    values["training"] = _training(values["training"], config.training)
    if protocol.form == "dense":
        values["merging"] = {"protocol": config.merging.protocol}
        del values["routing"], values["upcycle"], values["training"]["router_learning_rate"]
        if config.tuning.mode != "lora":
            del values["tuning"]


def _training(values: dict[str, Any], training: TrainingConfig) -> dict[str, Any]:
    """Drop what has no effect; null is the learning rate, and an extra key at its default is as if not written."""
    extra = training.model_extra or {}
    effective = {name: value for name, value in values.items() if name not in WITHOUT_EFFECT}
    effective = {k: v for k, v in effective.items() if k not in extra or v != training_arguments.default(k)}
    for name in ("router_learning_rate", "curvature_learning_rate"):
        if name in effective and effective[name] is None:
            effective[name] = training.learning_rate
    if training.max_steps > 0:
        del effective["num_train_epochs"]
    follows = training.eval_strategy == "steps" and extra.get("eval_steps") is None
    if follows and training.logging_steps != LOGGED:  # at the default as before it counted
        effective["eval_steps"] = training.logging_steps
    # as before there was such a key; where it is given, it decides
    del effective[
        "global_batch_size" if training.global_batch_size is None else "per_device_train_batch_size"
    ]
    return effective
