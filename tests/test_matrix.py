"""Every task with every embedded backbone that has its head: a few rows, two steps, an evaluation, predictions."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from camex_ft.config import Config
from camex_ft.data import sources
from camex_ft.results import RunFolder
from camex_ft.run import pipeline
from camex_ft.synthetic.corpora import CORPORA
from camex_ft.tasks.base import Prepared
from camex_ft.upcycling import expert_layers
from camex_ft.utils.registry import EMBEDDED, TASKS

ROWS = 4  # examples a split; a candidate task makes more rows of them
STEPS = 2


OPTIONS = {"lm": {"block_size": 32}, "qa": {"max_length": 64, "doc_stride": 16}}


@cache
def few(name: str) -> dict[str, Dataset]:
    """Return the first examples of every split of an embedded corpus, made short: a whole one takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for corpus in CORPORA.names():
            sizes = CORPORA.get(corpus).sizes
            for split in sizes:
                patch.setitem(sizes, split, 4 * ROWS)
        sources._corpus.cache_clear()
        splits = sources.load(TASKS.get(name), source="embedded")
        sources._corpus.cache_clear()
    return {split: data.select(range(ROWS)) for split, data in splits.items()}


def settled(name: str, family: str) -> Config:
    suite, _, task = name.partition("/")
    return Config.model_validate(
        {
            "profile": "embedded",
            "backbone": f"embedded/{family}",
            "task": {"suite": suite, "name": task, **OPTIONS.get(suite, {"max_length": 64})},
            "data": {"source": "embedded"},
            "merging": {"protocol": "ties-ca", "experts": 3, "curvature": {"rank": 2}},
            "training": {
                "max_steps": STEPS,
                "per_device_train_batch_size": 2,
                "eval_strategy": "no",
                "save_strategy": "no",
                "load_best_model_at_end": False,
                "disable_tqdm": True,
            },
        }
    )


def pairs() -> list:
    """Every task with every backbone that has its head. Every fourth is not slow: each of both is met several times."""
    found = [
        (n, f) for n in TASKS.names() for f in EMBEDDED.names() if TASKS.get(n).head in EMBEDDED.get(f).heads
    ]
    places = {name: place for names in (TASKS.names(), EMBEDDED.names()) for place, name in enumerate(names)}
    return [
        pytest.param(n, f, marks=() if (places[n] + places[f]) % 4 == 0 else pytest.mark.slow)
        for n, f in found
    ]


@pytest.mark.parametrize(("name", "family"), pairs())
def test_task_trains_and_is_scored(name: str, family: str, tmp_path: Path) -> None:
    config, task, splits = settled(name, family), TASKS.get(name), few(name)
    model, tokenizer = pipeline.load_model(config, task)
    start = {key: value.clone() for key, value in model.named_parameters()}
    data = Prepared.make(task, splits, tokenizer, config.task)
    trainer = pipeline.make_trainer(config, data, model, tokenizer, RunFolder(tmp_path))
    trainer.train()

    assert trainer.state.global_step == STEPS
    for layer in expert_layers(model):
        moved = [key for key in start if key.startswith(layer) and "experts" in key]
        parameters = dict(model.named_parameters())
        assert any(not torch.equal(parameters[key], start[key]) for key in moved), f"{layer} did not train"
    split, primary = data.primary
    metrics = trainer.evaluate()
    assert math.isfinite(metrics[f"eval_{split}_{primary}"])
    assert set(trainer.routing) == set(expert_layers(model))
    for test in data.test if task.files else ():
        predictions = data.predict(test, trainer.collect(data.encoded[test]))
        target = tmp_path / task.files[test]
        task.submission(predictions, data.rows[test], target)
        assert target.stat().st_size > 0
