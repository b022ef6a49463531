"""Scores of every row of a study on the data of each branch, and on all data.

Trained rows are the models of their runs. Others are put together here, without training: the mean of the branches'
parameters, and merged models as they begin. Scores are cached in the study's folder by model and data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from camex_ft import upcycling
from camex_ft.backbones.donors import checkpoints_of, content_of
from camex_ft.branching.stages import Runs, Study
from camex_ft.branching.study import ALL, AVERAGE, START
from camex_ft.config import Config, config_hash
from camex_ft.data import sources
from camex_ft.results import find_done
from camex_ft.run import donor_texts, steps
from camex_ft.run.inference import Trained, load_trained
from camex_ft.tasks.base import Prepared, Task
from camex_ft.utils.durable import write_atomically
from camex_ft.utils.registry import TASKS

CACHE = "scores.json"
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class ScoreKey(NamedTuple):
    """Place of a score: row, seed, and source, a branch's label or `ALL`."""

    row: str
    seed: int
    source: str


@dataclass(frozen=True, kw_only=True)
class StudyScores:
    """Scores of a study.

    Attributes:
        metric: the primary metric.
        greater_is_better: whether more of it is better.
        scores: by row, seed and source.
        steps: optimizer steps of a row's training in all, with those of the runs before it; None if a record lacks
            them.
    """

    metric: str
    greater_is_better: bool
    scores: Mapping[ScoreKey, float]
    steps: Mapping[str, int | None]


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """Model to score: its row, its seed, a name of its content for the cache, its loading, and the runs in it."""

    row: str
    seed: int
    name: str
    load: Callable[[], Loaded]
    runs: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Data that rows are scored on: validation splits under a configuration, and their SHA-256."""

    label: str
    settled: Config
    splits: Mapping[str, Dataset]
    digest: str

    @property
    def task(self) -> Task:
        task: Task = TASKS.get(self.settled.task.id)
        return task

    def prepared(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Prepared:
        """Return the data for the models of the study, which have one vocabulary."""
        settings = self.task.within(model.config, self.settled.task)
        return Prepared.make(self.task, self.splits, tokenizer, settings)


def score_study(study: Study, runs: Runs, *, tell: Callable[[str], None] = print) -> StudyScores:
    """Score every row whose runs are finished on every source.

    Args:
        study: with its steps.
        runs: the finished runs.
        tell: prints a line.
    """
    steps.quieten()
    measured_on = [_source(study, label) for label in (*study.spec.labels, ALL)]
    file = study.folder / CACHE
    cache: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    scores: dict[ScoreKey, float] = {}
    totals: dict[str, int | None] = {}
    prepared: dict[str, Prepared] = {}
    for candidate in _candidates(study, runs):
        totals[candidate.row] = _optimizer_steps(candidate.runs)
        keys = {source.label: f"{candidate.name} {source.digest}" for source in measured_on}
        if not all(key in cache for key in keys.values()):
            tell(f"scoring {candidate.row}, seed {candidate.seed}")
            model, tokenizer = candidate.load()
            for source in measured_on:
                if source.label not in prepared:
                    prepared[source.label] = source.prepared(model, tokenizer)
                data = prepared[source.label]
                measured = Trained(settled=source.settled, data=data, model=model, tokenizer=tokenizer)
                cache[keys[source.label]] = measured.measure()["_".join(data.primary)]
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(cache, indent=1))
        for label, key in keys.items():
            scores[ScoreKey(candidate.row, candidate.seed, label)] = cache[key]
    owner = measured_on[-1].task.owner(measured_on[-1].task.splits["validation"][0])
    return StudyScores(
        metric=owner.primary, greater_is_better=owner.greater_is_better, scores=scores, steps=totals
    )


def _source(study: Study, label: str) -> _Source:
    """Return the validation data of a branch, or those of the study's configuration."""
    branch = next((step for step in study.steps if step.label == label), None)
    settled = study.base if branch is None else study.cell(branch, study.spec.seed_list()[0]).settled
    task: Task = TASKS.get(settled.task.id)
    splits = steps.load_splits(settled, task)
    splits = {split: splits[split] for split in task.splits["validation"] if split in splits}
    return _Source(label=label, settled=settled, splits=splits, digest=sources.fingerprint(splits))


def _candidates(study: Study, runs: Runs) -> Iterator[_Candidate]:
    """Yield the models to score: the start, the branches, their average, baselines, merged models."""
    for seed in study.spec.seed_list():
        before = (runs[START, seed],) if (START, seed) in runs else ()
        donors = tuple(runs[label, seed] for label in study.spec.labels if (label, seed) in runs)
        if study.spec.start == "none":
            name = content_of(study.base.backbone).sha256 or study.base.backbone
            yield _Candidate(row=START, seed=seed, name=name, load=partial(_begin, study.base), runs=())
        for step in study.steps:
            path = runs.get((step.label, seed))
            earlier = (*(before if step.label != START else ()), *(donors if step.donors else ()))
            if path is not None:
                load: Callable[[], Loaded] = partial(load_trained, path)
                yield _Candidate(row=step.label, seed=seed, name=path.name, load=load, runs=(*earlier, path))
            elif step.untrained and all((label, seed) in runs for label in step.needs):
                settled = study.cell(step, seed, runs).settled
                content = content_of(settled.backbone, checkpoints_of(settled.upcycle)).sha256 or ""
                name = f"untrained {config_hash(settled, backbone=content)}"
                load = partial(_begin, settled)
                yield _Candidate(row=step.label, seed=seed, name=name, load=load, runs=earlier)
        if len(donors) == len(study.spec.labels):
            name = " + ".join(path.name for path in donors)
            load = partial(average, donors)
            yield _Candidate(row=AVERAGE, seed=seed, name=name, load=load, runs=(*before, *donors))


def _begin(settled: Config) -> Loaded:
    """Return the model of a run as its training begins, with fitted routers where they are asked for."""
    set_seed(settled.training.seed)
    model, tokenizer = steps.load_model(settled, TASKS.get(settled.task.id))
    if settled.routing.init == "fit" and upcycling.expert_layers(model):
        donor_texts.fit(settled, model, tokenizer, say=lambda line: None)
    return model, tokenizer


@torch.no_grad()
def average(runs: Sequence[Path]) -> Loaded:
    """Return the dense model whose parameters are the means of those of finished runs, with the first one's tokenizer.

    The runs are loaded one after the other; sums are in float32 or wider.
    """
    model, tokenizer = load_trained(runs[0])
    sums = {name: p.to(torch.promote_types(p.dtype, torch.float32)) for name, p in model.named_parameters()}
    for path in runs[1:]:
        other = dict(load_trained(path)[0].named_parameters())
        sums = {name: total + other[name] for name, total in sums.items()}
    for name, parameter in model.named_parameters():
        parameter.copy_(sums[name] / len(runs))
    return model, tokenizer


def _optimizer_steps(runs: Sequence[Path]) -> int | None:
    """Return the sum of the optimizer steps of finished runs; None if a record lacks them."""
    records = [find_done(path) for path in runs]
    counts = [record.cost.steps if record is not None else None for record in records]
    return None if None in counts else sum(count for count in counts if count is not None)
