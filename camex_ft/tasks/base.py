"""What a task is, and how one is registered.

A task holds the benchmark's columns (`features`, exactly the hub's), and functions that turn an example into the rows
that the model scores, the model's logits into decisions, and decisions into metrics and into the benchmark's
submission file. Most examples are one row; COPA, MultiRC and ReCoRD make one row a candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value

from camex_ft.registry import TASKS
from camex_ft.tasks.metrics import Scores, TaskMetric

Example = Mapping[str, Any]
Row = dict[str, Any]
Predictions = Sequence[Any]
Format = Callable[[Example], list[Row]]

PLAIN_SPLITS: Mapping[str, Any] = {"train": "train", "validation": ("validation",), "test": ("test",)}
WITHHELD = -1


def most_likely(logits: np.ndarray, rows: Dataset) -> list[int]:
    """Return the class with the greatest logit of every row. logits: [rows, classes]."""
    return [int(i) for i in np.argmax(logits, axis=-1)]


def nothing_wrong(example: Example) -> str | None:
    """Find no fault with an example: the check of tasks whose columns have nothing to do with each other."""
    return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One task of a benchmark.

    Attributes:
        suite: ``"glue"`` or ``"superglue"``; the registry's name is ``suite/name``.
        name: the hub's name of the task, such as ``"sst2"``.
        benchmark_name: the benchmark's own name, of its folder and its submission file, such as ``"SST-2"``.
        summary: one line for listings.
        hub: hub id of the data set that holds the task as a configuration.
        features: columns, types and label names, exactly the hub's.
        label_names: names of the classes of a *row*, as the model's config gets them; None for regression.
        primary: name of the metric that tables show and that chooses the best epoch.
        format: example -> rows, each with text, text_pair, label and, unless it is ``str(idx)``, group.
        score: predictions and their rows -> metrics, the primary one among them.
        lines: predictions and their rows -> the lines of the submission file.
        decide: logits [rows, classes] and their rows -> predictions in the task's own terms.
        check: what is wrong with an example, or None; for faults that types and label names do not show.
        splits: ``train`` (one name), ``validation`` and ``test`` (tuples of names).
        files: test split -> name of its submission file.
        extra: types of the columns that `format` adds.
        aliases: column -> its header in the benchmark's own files, where it differs.
        headerless: columns of the benchmark's own tsv files that have no header line.
        unpack: record of the benchmark's own jsonl files -> examples.
        grouped: whether rows belong together by their ``idx``, which then must differ from row to row.
        numbered: whether a data set without ``idx`` can be numbered row by row.
        label_range: least and greatest label of a regression.
        train_from: the task whose train and validation splits a test-only diagnostic uses.
    """

    suite: str
    name: str
    benchmark_name: str
    summary: str
    hub: str
    features: Features
    label_names: tuple[str, ...] | None
    primary: str
    format: Format
    score: Callable[[Predictions, Dataset], Scores]
    lines: Callable[[Predictions, Dataset], Iterable[str]]
    decide: Callable[[np.ndarray, Dataset], Predictions] = most_likely
    check: Callable[[Example], str | None] = nothing_wrong
    splits: Mapping[str, Any] = field(default_factory=lambda: PLAIN_SPLITS)
    files: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    headerless: tuple[str, ...] = ()
    unpack: Callable[[Example], list[Row]] | None = None
    grouped: bool = False
    numbered: bool = True
    label_range: tuple[float, float] | None = None
    train_from: str | None = None

    @property
    def id(self) -> str:
        """The registry's name, ``suite/name``."""
        return f"{self.suite}/{self.name}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that every data file must have; a missing ``idx`` is numbered where it can be."""
        return tuple(c for c in self.features if c != "label" and not (c == "idx" and self.numbered))

    @property
    def num_labels(self) -> int:
        """Size of the model's head: the number of classes, or 1 for regression."""
        return len(self.label_names) if self.label_names else 1

    @property
    def regression(self) -> bool:
        """Whether labels are real numbers."""
        return self.label_names is None

    def all_splits(self) -> tuple[str, ...]:
        """Return train, validation and test splits in this order."""
        return (self.splits["train"], *self.splits["validation"], *self.splits["test"])

    def owner(self, split: str) -> Task:
        """Return the task whose columns `split` has: itself, or for a diagnostic's train data the `train_from` task."""
        if self.train_from is None or split in self.splits["test"]:
            return self
        donor: Task = TASKS.get(self.train_from)
        return donor

    def rows(self, dataset: Dataset, split: str) -> Dataset:
        """Return the rows that the model scores, in the examples' order.

        Columns: text (str), text_pair (str or None), label (int, or float for regression; -1 where withheld),
        group (str, shared by the candidates of one example), idx (as in the benchmark), the task's `extra`
        columns, and domain (int) if the data set has it.
        """
        owner = self.owner(split)
        label = Value("float32") if owner.regression else Value("int64")
        features = {
            "text": Value("string"),
            "text_pair": Value("string"),
            "label": label,
            "group": Value("string"),
        }
        features |= {"idx": owner.features["idx"], **owner.extra}
        features |= {"domain": Value("int32")} if "domain" in dataset.column_names else {}
        return dataset.map(
            partial(_format_batch, owner.format, tuple(features)),
            batched=True,
            remove_columns=dataset.column_names,
            features=Features(features),
            load_from_cache_file=False,  # the cache's key does not see a change of the code
            desc=f"{self.id}: rows of {split}",
        )

    def predict(self, logits: Any, rows: Dataset) -> Predictions:
        """Return decisions in the task's own terms: class ids, real numbers, the choice (COPA) or the text (ReCoRD).

        Args:
            logits: [rows, classes]; of a tuple, as encoder-decoder models return, the first element.
            rows: what `rows` returned, in the same order.
        """
        scores = np.asarray(logits[0] if isinstance(logits, tuple) else logits, dtype=np.float64)
        if scores.shape != (len(rows), self.num_labels):
            raise ValueError(
                f"{self.id} needs logits [{len(rows)}, {self.num_labels}], not {list(scores.shape)}"
            )
        return self.decide(scores, rows)

    def metrics(self, logits: Any, rows: Dataset) -> Scores:
        """Return the metrics of labelled rows; `ValueError` where the benchmark withholds the labels."""
        if not labelled(rows):
            raise ValueError(
                f"{self.id}: the labels of these rows are withheld, so there is nothing to measure"
            )
        return self.score(self.predict(logits, rows), rows)

    def submission(self, predictions: Predictions, rows: Dataset, path: str | Path) -> None:
        """Write `predictions` of a whole test split in the form that the benchmark's site takes (see `files`)."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(f"{line}\n" for line in self.lines(predictions, rows)), encoding="utf-8")


def task(**attributes: Any) -> Callable[[Format], Format]:
    """Register the decorated function as the `format` of a task with these `attributes` (those of `Task`)."""

    def register(function: Format) -> Format:
        entry = Task(format=function, **attributes)
        TASKS.add(entry.id, entry)
        return function

    return register


def labelled(rows: Dataset) -> bool:
    """Return whether every row has its label; a benchmark's own test splits mostly have not."""
    return WITHHELD not in set(rows["label"][:])


def by_label(metric: type[TaskMetric]) -> Callable[[Predictions, Dataset], Scores]:
    """Return the `score` of tasks that compare one prediction a row with the row's label."""

    def score(predictions: Predictions, rows: Dataset) -> Scores:
        columns = {"predictions": predictions, "references": rows["label"][:]}
        if "groups" in metric.inputs:
            columns["groups"] = rows["group"][:]
        return dict(metric().compute(**columns) or {})

    return score


def _format_batch(
    function: Format, columns: tuple[str, ...], batch: Mapping[str, list[Any]]
) -> dict[str, list[Any]]:
    made: dict[str, list[Any]] = {column: [] for column in columns}
    for values in zip(*batch.values(), strict=True):
        example = dict(zip(batch, values, strict=True))
        shared = {"group": str(example["idx"]), "idx": example["idx"], "domain": example.get("domain")}
        for row in function(example):
            full = {"text_pair": None, **shared, **row}
            for column in columns:
                made[column].append(full[column])
    return made
