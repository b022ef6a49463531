"""Every field of `transformers.TrainingArguments` that a configuration may set, tried once a kind of task.

What cannot work is refused before a model is built. What is taken leaves an evaluation complete, the model as it was
before the evaluation, and its parameters in float32. What changes weights or metrics is in the hash, and what is left
out of the hash changes neither, bit for bit.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from camex_ft.config import ConfigErrors, TrainingConfig, config_hash
from camex_ft.config.identity import WITHOUT_EFFECT
from camex_ft.config.training_arguments import OWNED, default, fields
from camex_ft.training.arguments import training_arguments
from camex_ft.training.callbacks.reporting import only_metrics
from camex_ft.utils.errors import UserError
from tests.helpers.task_runs import KINDS, configuration, trainer
from tests.helpers.training_runs import same, weights

OPEN = sorted(set(fields()) - set(OWNED))
# Values of the fields that are neither switches nor words.
VALUES: dict[str, list[Any]] = {
    "accelerator_config": [{"split_batches": True}, {"even_batches": False}, {"nonsense": 1}],
    "activation_checkpointing_kwargs": [{"use_reentrant": True}, {"every_n_layers": 2}, {"nonsense": 1}],
    "adam_beta1": [0.0, 0.5, 1.0],
    "adam_beta2": [0.0, 0.5, 1.0],
    "adam_epsilon": [0.0, 1e-3],
    "data_seed": [0, 7],
    "dataloader_num_workers": [1],
    "dataloader_prefetch_factor": [2],
    "ddp_bucket_cap_mb": [1],
    "ddp_timeout": [60],
    "deepspeed": ["nonsense.json"],
    "eval_accumulation_steps": [1, 2],
    "eval_delay": [0.5, 50],
    "eval_steps": [1, 0.5, 0, 2.5],
    "fsdp": ["full_shard"],
    "fsdp_config": [{"min_num_params": 10}],
    "gradient_accumulation_steps": [2, 50],
    "gradient_checkpointing_kwargs": [{"use_reentrant": True}, {"preserve_rng_state": False}],
    "include_for_metrics": [["inputs"], ["loss"], ["nonsense"]],
    "include_num_input_tokens_seen": ["all", "non_padding", True, "nonsense"],
    "label_smoothing_factor": [0.1, 1.0],
    "learning_rate": [1e-12, 1e-3, 0],
    "liger_kernel_config": [{"rope": True}],
    "logging_steps": [0.1, 2, 50, 1.5],
    "lr_scheduler_kwargs": [{"nonsense": 1}],
    "max_grad_norm": [0.0, 0.1],
    "max_steps": [0, 1],
    "neftune_noise_alpha": [0, 5.0],
    "num_train_epochs": [1e-9, 2],
    "optim_args": ["nonsense"],
    "optim_target_modules": ["all-linear"],
    "per_device_eval_batch_size": [1, 99],
    "per_device_train_batch_size": [1, 99],
    "project": ["name"],
    "report_to": ["none"],
    "run_name": ["name"],
    "save_steps": [1, 0.5, 50],
    "save_total_limit": [1],
    "seed": [0, 7],
    "torch_compile_backend": ["nonsense"],
    "torch_compile_mode": ["nonsense"],
    "torch_empty_cache_steps": [1],
    "trackio_bucket_id": ["some/body"],
    "trackio_space_id": ["some/body"],
    "trackio_static_space_id": ["some/body"],
    "warmup_steps": [0.5, 2, 1000],
    "weight_decay": [0.5],
}
# Fields that mean something with another one alone.
WITH: dict[str, dict[str, Any]] = {
    "activation_checkpointing_kwargs": {"activation_checkpointing": True},
    "bf16": {"use_cpu": True},
    "bf16_full_eval": {"use_cpu": True},
    "dataloader_in_order": {"dataloader_num_workers": 1},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": 1},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "gradient_checkpointing_kwargs": {"gradient_checkpointing": True},
    "load_best_model_at_end": {"save_strategy": "steps", "save_steps": 2},
    "num_train_epochs": {"max_steps": -1},
    "save_only_model": {"save_strategy": "steps", "save_steps": 2},
    "save_total_limit": {"save_strategy": "steps", "save_steps": 1},
    "save_steps": {"save_strategy": "steps"},
    "torch_compile": {"torch_compile_backend": "eager"},
}
# Processes that are started and code that is compiled take seconds: once is enough.
ONCE = ("dataloader_", "torch_compile", "auto_find_batch_size", "optim")


class Case(NamedTuple):
    kind: str
    name: str
    value: Any

    @property
    def settings(self) -> dict[str, Any]:
        return {**WITH.get(self.name, {}), self.name: self.value}

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}-{json.dumps(self.value)}"


class Outcome(NamedTuple):
    hash: str
    weights: dict[str, Tensor]
    metrics: dict[str, float]


def values(name: str) -> list[Any]:
    if name in VALUES:
        return VALUES[name]
    _, given, words = fields()[name]
    return [word for word in words if word != getattr(given, "value", given)] or [not given]


CASES = [
    Case(kind, name, value)
    for kind in KINDS
    for name in OPEN
    for value in values(name)
    if kind == "classification" or not name.startswith(ONCE)
]
# Fields that were at fault once; the quick form of the trial takes the first value of each.
ONCE_AT_FAULT = {
    *("fp16", "optim_args", "lr_scheduler_kwargs", "skip_memory_metrics", "fsdp", "ddp_backend", "max_steps"),
    *(
        "adam_epsilon",
        "use_liger_kernel",
        "torch_compile_backend",
        "bf16_full_eval",
        "gradient_accumulation_steps",
    ),
}
QUICK = {c.name: c for c in reversed(CASES) if c.name in ONCE_AT_FAULT and c.kind == "classification"}


def ran(case: Case, folder: Path) -> Outcome | str:
    """What comes of a case, or the message that refuses it; any other error is a fault."""
    return run(case.kind, folder, **case.settings)


def run(kind: str, folder: Path, **settings: Any) -> Outcome | str:
    try:
        settled = configuration(kind, *(f"training.{k}={json.dumps(v)}" for k, v in settings.items()))
        training_arguments(settled.training, output=folder, best=None)
    except (ConfigErrors, UserError) as error:
        return str(error)
    made = trainer(kind, folder, **settings)
    made.train()
    trained = weights(made)
    metrics = only_metrics(made.evaluate("validation"))
    rows = made.eval_dataset["validation"]
    collected = made.collect(rows)
    assert len(collected[0] if isinstance(collected, tuple) else collected) == len(rows)
    assert same(trained, weights(made)) == [], "an evaluation has changed the model"
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}
    return Outcome(config_hash(settled), trained, metrics)


@cache
def plain(kind: str, folder: Path, **settings: Any) -> Outcome:
    found = run(kind, folder, **settings)
    assert isinstance(found, Outcome), found
    return found


def check(case: Case, folder: Path) -> None:
    found = ran(case, folder / "case")
    if isinstance(found, str):
        assert "training." in found or "training: " in found, found
        return
    expected = plain(case.kind, folder.parent / case.kind, **WITH.get(case.name, {}))
    assert found.metrics.keys() == expected.metrics.keys()
    names = [name.removeprefix("_orig_mod.") for name in found.weights]
    changed = same(dict(zip(names, found.weights.values(), strict=True)), expected.weights)
    # float32: batches of another size add up in another order; a correlation is of predictions that differ by little
    close = {k: 1e-4 if k == "pearson" else 1e-5 for k in expected.metrics}
    moved = [
        k
        for k, v in expected.metrics.items()
        if found.metrics[k] != pytest.approx(v, rel=close[k], nan_ok=True)
    ]
    if found.hash == expected.hash:
        assert not changed and not moved
    else:
        assert case.name not in WITHOUT_EFFECT


needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused is what a CPU has not")


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_field(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@needs_cpu
@pytest.mark.parametrize("case", QUICK.values(), ids=str)
def test_fields_that_once_were_at_fault(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


def test_what_is_left_out_of_the_hash_may_be_written() -> None:
    known = {*fields(), *TrainingConfig.model_fields}
    assert known >= WITHOUT_EFFECT, WITHOUT_EFFECT - known


def test_every_field_has_a_value_to_try() -> None:
    assert {name for name in OPEN if not values(name)} == set()
    assert {*VALUES, *WITH} <= set(OPEN)
    assert all(
        default(name) not in values(name)
        for name in OPEN
        if default(name) is not None and name != "report_to"
    )
