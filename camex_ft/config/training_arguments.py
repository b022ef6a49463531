"""Keys of `training:` that belong to `transformers.TrainingArguments`: which there are, and what they take.

Importing that class imports torch, so it happens only when a key is met that neither the schema nor `COMMON` has.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import types
import typing
from collections.abc import Mapping
from enum import Enum
from functools import lru_cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from camex_ft.config.values import WORDS, every
from camex_ft.utils.errors import nearest

OWNED = {
    "output_dir": "checkpoints go to the run's folder; set output.dir",
    "resume_from_checkpoint": "set training.resume",
    "do_train": "`camex-ft run` trains and evaluates",
    "do_eval": "`camex-ft run` trains and evaluates",
    "do_predict": "set task.predict",
    "label_names": "the task has them",
    "remove_unused_columns": "the toolkit's collator chooses the columns",
    "length_column_name": "the toolkit's data carry their lengths",
    "metric_for_best_model": "it is the task's primary metric",
    "greater_is_better": "it follows from the task's primary metric",
    "prediction_loss_only": "metrics need predictions",
    "batch_eval_metrics": "metrics are of the whole split",
    "eval_do_concat_batches": "metrics are of the whole split",
    "hub_token": "a secret would end up in the record; run `hf auth login`",
    "local_rank": "the launcher sets it",
    "enable_jit_checkpoint": "a run that gets SIGTERM is saved, and goes on later",
    "parallelism_config": "`--gpus`, `--nodes` and `--engine` say how processes share the work",
    "debug": "a loss that is not finite ends a run, and says at which step",
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_model_id",
            "hub_strategy",
            "hub_private_repo",
            "hub_always_push",
            "hub_revision",
        ),
        "nothing is uploaded by a run; `camex-ft push` does it",
    ),
}
# What a number may be, beyond its type. Above the upper ends it is a mistake, and would take all memory or processes
# before it fails.
ABOVE_0, SHARE, COUNT = {"gt": 0}, {"ge": 0, "lt": 1}, {"ge": 1}
RANGES: Mapping[str, Mapping[str, float]] = {
    "eval_steps": ABOVE_0,
    "save_steps": ABOVE_0,
    "adam_epsilon": ABOVE_0,
    "neftune_noise_alpha": ABOVE_0,
    "warmup_steps": {"ge": 0},
    "eval_delay": {"ge": 0},
    "max_grad_norm": {"ge": 0},
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "label_smoothing_factor": SHARE,
    "torch_empty_cache_steps": COUNT,
    "ddp_timeout": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "gradient_accumulation_steps": {"ge": 1, "le": 1_000_000},
    "eval_accumulation_steps": {"ge": 1, "le": 1_000_000_000},
    "dataloader_num_workers": {"ge": 0, "le": 512},
    "dataloader_prefetch_factor": {"ge": 1, "le": 1_000_000},
    "data_seed": {"ge": 0, "le": 2**32 - 1},
}
FOR_METRICS = ("inputs", "loss")
TOKENS_SEEN = (False, True, "no", "all", "non_padding")
MAPPINGS = (
    "lr_scheduler_kwargs",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing_kwargs",
)
SWITCHES = ("use_reentrant", "preserve_rng_state", "early_stop", "debug", "offload")
CHECKPOINTING = (*SWITCHES, "determinism_check", "every_n_layers")
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "group_by_length": "train_sampling_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
}
KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}
# Fields of everyday configurations, with what `fields` returns for them: they are checked without importing torch.
COMMON: Mapping[str, tuple[Any, Any, tuple[str, ...]]] = {
    "bf16": (bool, False, ()),
    "fp16": (bool, False, ()),
    "gradient_accumulation_steps": (int, 1, ()),
    "max_grad_norm": (float, 1.0, ()),
    "warmup_steps": (float, 0, ()),
}
STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


@lru_cache(maxsize=1)
def fields() -> dict[str, tuple[Any, Any, tuple[str, ...]]]:
    """Return each field's type, default and allowed words (empty: any)."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    known = {}
    for entry in dataclasses.fields(TrainingArguments):
        if not entry.init:
            continue
        words = [e.value for kind in _members(hints[entry.name]) if _is_enum(kind) for e in kind]
        words = words or list(entry.metadata.get("choices", ()))
        default = None if entry.default is dataclasses.MISSING else entry.default
        if entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
        known[entry.name] = (hints[entry.name], default, tuple(str(word) for word in words))
    return known


def is_field(name: str) -> bool:
    """Return whether `transformers.TrainingArguments` has this field."""
    return name in COMMON or name in fields()


def field(name: str) -> tuple[Any, Any, tuple[str, ...]]:
    """Return a field's type, default and allowed words, as of `fields`."""
    return COMMON[name] if name in COMMON else fields()[name]


def missing_reporters(named: Any) -> list[str]:
    """Return which of these trackers' packages are not installed."""
    wanted = [
        tracker
        for tracker in ([named] if isinstance(named, str) else named or [])
        if tracker not in ("none", "all")
    ]
    if not wanted:
        return []
    from transformers.integrations import get_available_reporting_integrations

    return [tracker for tracker in wanted if tracker not in get_available_reporting_integrations()]


def default(name: str) -> Any:
    """Return the default of a field."""
    return field(name)[1]


def coerce(name: str, value: Any) -> Any:
    """Return `value` as the field `name` takes it: an integer becomes a float where floats are, ``off`` becomes false.

    Raises:
        ValueError: the field doesn't take it; the message says what it takes.
    """
    hint, _, words = field(name)
    members = _members(hint)
    if words:
        if isinstance(value, str) and value in words:
            return value
        raise ValueError(f"expected one of {', '.join(words)}.{nearest(str(value), words)}")
    if isinstance(value, str) and bool in members and str not in members:
        value = WORDS.get(value.lower(), value)
    try:
        coerced = TypeAdapter(hint, config=STRICT).validate_python(value)
    except ValidationError:
        raise ValueError(f"expected {' or '.join(map(_kind, members))}") from None
    if name in MAPPINGS and isinstance(
        coerced, str
    ):  # a mapping in JSON, as on transformers' own command lines
        coerced = _mapping(coerced)
    if name in MAPPINGS[1:]:
        _check_checkpointing(coerced or {})
    if name == "report_to":
        _check_reporters(coerced)
    if name == "include_for_metrics":
        _check_words(coerced, FOR_METRICS)
    if name == "include_num_input_tokens_seen" and coerced not in TOKENS_SEEN:
        raise ValueError("expected true or false, or one of no, all, non_padding")
    if coerced is not None:
        _check_range(coerced, RANGES.get(name, {}))
    return every(coerced) if coerced is not None and name in ("eval_steps", "save_steps") else coerced


def _check_range(value: float, ends: Mapping[str, float]) -> None:
    """Raise `ValueError` unless a number is within the ends, as pydantic names them."""
    within = {"gt": operator.gt, "ge": operator.ge, "le": operator.le, "lt": operator.lt}
    words = {"gt": "more than", "ge": "at least", "le": "at most", "lt": "less than"}
    for end, bound in ends.items():
        if not within[end](value, bound):
            raise ValueError(f"expected {words[end]} {bound:,}")


def _mapping(text: str) -> dict[str, Any]:
    try:
        mapping = json.loads(text)
    except (ValueError, RecursionError):
        mapping = None
    if not isinstance(mapping, dict):
        raise ValueError("expected a mapping")
    return mapping


def _check_checkpointing(options: dict[str, Any]) -> None:
    """Raise `ValueError` unless these are options of transformers' activation checkpointing."""
    for key, value in options.items():
        if key not in CHECKPOINTING:
            raise ValueError(
                f"unknown option '{key}'.{nearest(key, CHECKPOINTING)} Known: {', '.join(CHECKPOINTING)}"
            )
        if key in SWITCHES and not isinstance(value, bool):
            raise ValueError(f"{key}: expected true or false")
        if key == "determinism_check" and value not in ("default", "none"):
            raise ValueError(f"{key}: expected default or none")
        if key == "every_n_layers" and (type(value) is not int or value < 1):
            raise ValueError(f"{key}: expected a whole number, at least 1")


def _check_reporters(named: str | list[str] | None) -> None:
    """Raise `ValueError` unless transformers knows these trackers."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known = ("none", "all", *INTEGRATION_TO_CALLBACK)
    _check_words([named] if isinstance(named, str) else named or [], known)


def _check_words(words: typing.Iterable[str], known: typing.Sequence[str]) -> None:
    """Raise `ValueError` unless each of the words is known."""
    for word in words:
        if word not in known:
            raise ValueError(f"expected any of {', '.join(known)}.{nearest(word, known)}")


def _members(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _kind(hint: Any) -> str:
    origin = typing.get_origin(hint) or hint
    if origin is typing.Literal:
        return " or ".join(str(word).lower() for word in typing.get_args(hint))
    return KINDS.get(origin) or {list: "a list", dict: "a mapping"}.get(origin) or str(origin.__name__)
