"""Texts of each donor, and the fit of a run's routers to them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from camex_ft.config import Config, load_config, resolve
from camex_ft.config.schema import CHECKPOINTS, TaskConfig
from camex_ft.data import sources
from camex_ft.tasks.base import Task
from camex_ft.upcycling import fit_routers
from camex_ft.upcycling.router_fit import FitQuality
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import TASKS

CONFIG = "config.yaml"  # in a run's folder, beside its model
LABELS = ("label", "labels")
UNKNOWN = 0.05  # mutual information below which a router knows nothing


def fit(
    settled: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    say: Callable[[str], None] = print,
) -> dict[str, FitQuality]:
    """Fit the routers of a run's model as `routing.fit` says, report the quality by layer, and return it.

    Args:
        settled: the resolved configuration.
        model: upcycled; changed in place.
        tokenizer: of the model.
        say: prints a line.

    Raises:
        UserError: a donor's texts are not there, or too few.
    """
    texts = donor_texts(settled, tokenizer)
    each = settled.upcycle.each if settled.upcycle.init == CHECKPOINTS else 1
    quality = fit_routers(model, texts, each=each)
    say(f"routers fitted to {settled.routing.fit.rows} texts of each of {len(texts)} donors, held-out texts:")
    for name, of_layer in quality.items():
        say(f"  {name}: {of_layer}")
    if all(of_layer.nmi < UNKNOWN for of_layer in quality.values()):
        say(
            "warning: no layer can tell the donors' texts apart, so that routing cannot know which donor an input "
            "needs: take donors of different data or more texts (routing.fit.rows), or merge the donors once"
        )
    return quality


def donor_texts(settled: Config, tokenizer: PreTrainedTokenizerBase) -> list[list[Mapping[str, Tensor]]]:
    """Return batches of model inputs without labels, of the first `routing.fit.rows` texts of each donor."""
    fit = settled.routing.fit
    if isinstance(fit.sources, str):
        donors = [run_of(donor) for donor in settled.upcycle.donors]
        return [_batches(_training_rows(donor, fit.rows), donor, tokenizer, fit.rows) for donor in donors]
    return [_batches(_rows_at(path, settled, fit.rows), settled, tokenizer, fit.rows) for path in fit.sources]


def run_of(donor: str) -> Config:
    """Return the resolved configuration of the run that a donor comes from.

    Raises:
        UserError: it is no run of camex_ft.
    """
    folder = Path(os.path.expanduser(donor))
    file = next((place / CONFIG for place in (folder, folder.parent) if (place / CONFIG).is_file()), None)
    if file is None:
        raise UserError(
            f"routing.fit.from: data is the training data of the donors' runs, and {donor} is no run of camex_ft (it "
            f"has no {CONFIG}): expected a list with a folder or file of rows for each donor"
        )
    return resolve(load_config(file), needs=False)[0]


def _training_rows(settled: Config, rows: int) -> Dataset:
    task: Task = TASKS.get(settled.task.id)
    data, split = settled.data, task.splits["train"]
    return sources.load(
        task,
        source=data.source,
        dir=data.path,
        seed=data.seed,
        train_rows=min(rows, data.train_rows or rows),
        splits=[split],
        serves=data.splits,
        domain=data.domain,
    )[split]


def _rows_at(place: str, settled: Config, rows: int) -> Dataset:
    """Return the rows of a file, or the training rows of a folder, in the columns of the run's task."""
    task: Task = TASKS.get(settled.task.id)
    path = Path(os.path.expanduser(place))
    if not path.is_dir():
        return sources.load_file(task, path)
    split = task.splits["train"]
    return sources.load(task, source="disk", dir=path, train_rows=rows, splits=[split])[split]


def _batches(
    examples: Dataset, settled: Config, tokenizer: PreTrainedTokenizerBase, rows: int
) -> list[Mapping[str, Tensor]]:
    task: Task = TASKS.get(settled.task.id)
    settings: TaskConfig = settled.task
    split = task.splits["train"]
    examples = examples.select(range(min(rows, len(examples))))
    encoded = task.encode(task.rows(examples, split), split, tokenizer, settings)
    size = settled.training.per_device_eval_batch_size
    loader: Any = DataLoader(encoded, batch_size=size, collate_fn=task.collator(tokenizer))
    keep_labels = task.head == "seq2seq-lm"  # the decoder's input is made of them
    return [{k: v for k, v in batch.items() if keep_labels or k not in LABELS} for batch in loader]
