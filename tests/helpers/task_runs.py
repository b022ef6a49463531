"""A small run of each kind of task, with rows that do not fill a batch: its configuration, and a trainer for it."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from camex_ft.config import Config, load_config, resolve
from camex_ft.results import RunFolder
from camex_ft.run.steps import load_model, load_splits, make_trainer, quieten
from camex_ft.tasks.base import Prepared, Task
from camex_ft.training.trainer import CamexTrainer
from camex_ft.utils.registry import TASKS

TRAIN, VALIDATION, BATCH, EVALUATED = 13, 7, 8, 5
KINDS = {
    "classification": ["task.suite=glue", "task.name=rte", "backbone=embedded/bert"],
    "regression": ["task.suite=glue", "task.name=stsb", "backbone=embedded/bert"],
    "lm": [
        "task.suite=lm",
        "task.name=wikitext-2",
        "task.block_size=64",
        "backbone=embedded/gpt2",
        "routing.segment=16",
        "data.train_rows=11",
        "data.eval_rows=3",
    ],
    "qa": [
        "task.suite=qa",
        "task.name=squad",
        "task.answer_length=4",
        "task.max_length=48",
        "backbone=embedded/t5",
    ],
}
SHARED = [
    "profile=embedded",
    "data.source=embedded",
    f"data.train_rows={TRAIN}",
    f"data.eval_rows={VALIDATION}",
    "merging.experts=2",
    "merging.curvature.rank=1",
    "upcycle.layers=[1]",
    "training.max_steps=2",
    f"training.per_device_train_batch_size={BATCH}",
    f"training.per_device_eval_batch_size={EVALUATED}",
    "training.eval_strategy=steps",
    "training.eval_steps=2",
    "training.save_strategy=no",
    "training.load_best_model_at_end=false",
    "training.logging_steps=1",
    "training.learning_rate=1e-2",
    "training.warmup_steps=0",
    "training.disable_tqdm=true",
]


class Made(NamedTuple):
    """What a run makes before its trainer."""

    task: Task
    data: Prepared
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def configuration(kind: str, *overrides: str) -> Config:
    """The resolved configuration of a kind's run."""
    return resolve(load_config("glue", [*SHARED, *KINDS[kind], *overrides]))[0]


@cache
def made(kind: str, *overrides: str) -> Made:
    """Data, model and tokenizer of a kind's run."""
    quieten()
    settled = configuration(kind, *overrides)
    task: Task = TASKS.get(settled.task.id)
    splits = load_splits(settled, task)
    set_seed(settled.training.seed)
    model, tokenizer = load_model(settled, task, splits)
    return Made(task, Prepared.make(task, splits, tokenizer, settled.task), model, tokenizer)


def trainer(kind: str, folder: Path, *overrides: str, **training: Any) -> CamexTrainer:
    """A trainer of a kind's run over a copy of its model.

    Args:
        kind: of `KINDS`.
        folder: of the run.
        overrides: what else the configuration says, as on the command line; changes data and model.
        training: keys of `training`.
    """
    parts = made(kind, *overrides)
    written = [f"training.{key}={_yaml(value)}" for key, value in training.items()]
    settled = configuration(kind, *overrides, *written)
    set_seed(settled.training.seed)
    return make_trainer(settled, parts.data, copy.deepcopy(parts.model), parts.tokenizer, RunFolder(folder))


def _yaml(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value)
