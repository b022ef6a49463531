"""Keys of `training:` that belong to `transformers.TrainingArguments`: which there are, and what they take.

Importing that class imports torch, so it happens only when a key is met that the schema does not name itself.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from enum import Enum
from functools import lru_cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from camex_ft.config.values import WORDS
from camex_ft.errors import nearest

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
# Beyond these a number is a mistake, and would take all memory or processes before it fails by itself.
MOST = {
    "dataloader_num_workers": 512,
    "dataloader_prefetch_factor": 1_000_000,
    "gradient_accumulation_steps": 1_000_000,
    "eval_accumulation_steps": 1_000_000_000,
    "data_seed": 2**32 - 1,
}
MAPPINGS = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs")
CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "early_stop", "debug")
LEAST = {
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "data_seed": 0,
    "dataloader_num_workers": 0,
}
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
STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


@lru_cache(maxsize=1)
def fields() -> dict[str, tuple[Any, Any, tuple[str, ...]]]:
    """Return each field's type, default and allowed words (empty: any)."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    found = {}
    for field in dataclasses.fields(TrainingArguments):
        if not field.init:
            continue
        words = [e.value for kind in _members(hints[field.name]) if _is_enum(kind) for e in kind]
        words = words or list(field.metadata.get("choices", ()))
        default = None if field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found[field.name] = (hints[field.name], default, tuple(str(word) for word in words))
    return found


def missing_reporters(named: Any) -> list[str]:
    """Return which of these trackers' packages are not installed."""
    wanted = [
        each for each in ([named] if isinstance(named, str) else named or []) if each not in ("none", "all")
    ]
    if not wanted:
        return []
    from transformers.integrations import get_available_reporting_integrations

    return [each for each in wanted if each not in get_available_reporting_integrations()]


def default(name: str) -> Any:
    """Return the default of a field."""
    return fields()[name][1]


def coerce(name: str, value: Any) -> Any:
    """Return `value` as the field `name` takes it: an integer becomes a float where floats are, ``off`` becomes false.

    Raises:
        ValueError: the field doesn't take it; the message says what it takes.
    """
    hint, _, words = fields()[name]
    members = _members(hint)
    if words:
        if isinstance(value, str) and value in words:
            return value
        raise ValueError(f"expected one of {', '.join(words)}.{nearest(str(value), words)}")
    if isinstance(value, str) and bool in members and str not in members:
        value = WORDS.get(value.lower(), value)
    try:
        made = TypeAdapter(hint, config=STRICT).validate_python(value)
    except ValidationError:
        raise ValueError(f"expected {' or '.join(map(_kind, members))}") from None
    if name in MAPPINGS and isinstance(made, str):  # a mapping in JSON, as on transformers' own command lines
        made = _mapping(made)
    if name == "gradient_checkpointing_kwargs":
        _check_checkpointing(made or {})
    if name == "report_to":
        _check_reporters(made)
    if made is not None and name in LEAST and made < LEAST[name]:
        raise ValueError(f"expected at least {LEAST[name]}")
    if made is not None and name in MOST and made > MOST[name]:
        raise ValueError(f"expected at most {MOST[name]:,}")
    return made


def _mapping(text: str) -> dict[str, Any]:
    try:
        made = json.loads(text)
    except (ValueError, RecursionError):
        made = None
    if not isinstance(made, dict):
        raise ValueError("expected a mapping")
    return made


def _check_checkpointing(given: dict[str, Any]) -> None:
    """Raise `ValueError` unless these are options of `torch.utils.checkpoint.checkpoint` with true or false."""
    for key, value in given.items():
        if key not in CHECKPOINTING:
            raise ValueError(
                f"unknown option '{key}'.{nearest(key, CHECKPOINTING)} Known: {', '.join(CHECKPOINTING)}"
            )
        if not isinstance(value, bool):
            raise ValueError(f"{key}: expected true or false")


def _check_reporters(named: str | list[str] | None) -> None:
    """Raise `ValueError` unless transformers knows these trackers."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for each in [named] if isinstance(named, str) else named or []:
        if each not in ("none", "all", *INTEGRATION_TO_CALLBACK):
            known = ("none", "all", *INTEGRATION_TO_CALLBACK)
            raise ValueError(f"expected one of {', '.join(known)}.{nearest(each, known)}")


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
