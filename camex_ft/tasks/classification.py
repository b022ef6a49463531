"""Classification and regression of texts and pairs of texts.

A task is made of functions: from an example to the rows that the model scores, from logits to decisions, from decisions
to metrics and to the benchmark's submission file. Most examples are one row; COPA, MultiRC and ReCoRD have one row for
each candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from pydantic import Field

from camex_ft.config.schema import TaskConfig
from camex_ft.config.values import Count
from camex_ft.tasks.base import Collator, Example, Predictions, Row, Task, map_rows, write_submission
from camex_ft.tasks.encoding import collator, encode
from camex_ft.utils.registry import TASKS

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from camex_ft.tasks.metrics import Scores, TaskMetric

Format = Callable[[Example], list[Row]]


def most_likely(logits: np.ndarray, rows: Dataset) -> list[int]:
    """Return the class with the greatest logit of every row. logits: [rows, classes]."""
    return [int(i) for i in np.argmax(logits, axis=-1)]


class ClassificationConfig(TaskConfig):
    """The texts of a row are one sequence of tokens."""

    kind = "classification"
    lengths = ("max_length",)

    max_length: Count = Field(default=128, description="Longest input, in tokens; longer ones are cut.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Classification(Task[ClassificationConfig]):
    """A task whose rows get a class, or a number.

    Attributes:
        label_names: names of the classes of a *row*, as the model's config gets them; None for regression.
        format: example -> rows, each with text, text_pair, label and, unless it is ``str(idx)``, group.
        score: predictions and their rows -> metrics, the primary one among them.
        lines: predictions and their rows -> the lines of the submission file.
        decide: logits [rows, classes] and their rows -> predictions in the task's own terms.
        extra: types of the columns that `format` adds, as `build_features` takes them.
        texts: one, or the two of a pair.
    """

    head: ClassVar[str] = "sequence-classification"
    config_class: ClassVar[type[TaskConfig]] = ClassificationConfig

    label_names: tuple[str, ...] | None
    format: Format
    score: Callable[[Predictions, Dataset], Scores]
    lines: Callable[[Predictions, Dataset], Iterable[str]]
    decide: Callable[[np.ndarray, Dataset], Predictions] = most_likely
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_labels(self) -> int:
        """Size of the model's head: the number of classes, or 1 for regression."""
        return len(self.label_names) if self.label_names else 1

    @property
    def regression(self) -> bool:
        """Return whether labels are real numbers."""
        return self.label_names is None

    @property
    def kind_names(self) -> tuple[str, ...]:
        """The classes, where a row is one of them."""
        return self.label_names or ()

    def backbone_options(self) -> dict[str, Any]:
        """Return the names of the labels, or None for regression."""
        return {"label_names": self.label_names, "regression": self.regression}

    def rows(self, dataset: Dataset, split: str) -> Dataset:
        """Return the rows that the model scores, in the examples' order.

        Columns: text (str), text_pair (str or None), label (int, or float for regression; -1 where withheld),
        group (str, shared by the candidates of one example), idx (as in the benchmark), the task's `extra`
        columns, and domain (int) if the data set has it.
        """
        owner = cast(Classification, self.owner(split))
        label = "float32" if owner.regression else "int64"
        features = {"text": "string", "text_pair": "string", "label": label, "group": "string"}
        features |= {"idx": owner.features["idx"], **owner.extra}
        features |= {"domain": "int32"} if "domain" in dataset.column_names else {}
        function = partial(_format_batch, owner.format, tuple(features))
        return map_rows(dataset, function, features, f"{self.id}: rows of {split}", batched=True)

    def encode(
        self, rows: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, settings: ClassificationConfig
    ) -> Dataset:
        """Return the tokenised rows, one for one; see `encode.encode`."""
        return encode(rows, tokenizer, max_length=settings.max_length)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """Return the collator that pads a batch to its longest row."""
        return collator(tokenizer)

    def predict(self, outputs: Any, rows: Dataset, origin: np.ndarray | None = None) -> Predictions:
        """Return decisions in the task's own terms: class ids, real numbers, the choice (COPA) or the text (ReCoRD).

        Args:
            outputs: logits, [rows, classes]; of a tuple, as of encoder-decoder models, the first element counts.
            rows: the result of `rows`, in the same order.
            origin: unused, since rows and encoded rows are one for one.
        """
        scores = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs, dtype=np.float64)
        if scores.shape != (len(rows), self.num_labels):
            raise ValueError(
                f"{self.id} needs logits [{len(rows)}, {self.num_labels}], not {list(scores.shape)}"
            )
        return self.decide(scores, rows)

    def metrics(self, outputs: Any, rows: Dataset, origin: np.ndarray | None = None) -> Scores:
        """Return the metrics of labelled rows; `ValueError` if the benchmark withholds the labels."""
        self.check_labelled(rows)
        return self.score(self.predict(outputs, rows), rows)

    def correct(self, outputs: Any, rows: Dataset, origin: np.ndarray | None = None) -> np.ndarray | None:
        """Return the mask of correct rows if a row is an example and labels are classes, else None."""
        if self.regression or self.decide is not most_likely:
            return None
        return np.asarray(self.predict(outputs, rows)) == np.asarray(rows["label"][:])

    def submission(self, predictions: Predictions, rows: Dataset, path: str | Path) -> None:
        """Write `predictions` of a whole test split in the form that the benchmark's site takes (see `files`)."""
        write_submission(path, "".join(f"{line}\n" for line in self.lines(predictions, rows)))


def task(**attributes: Any) -> Callable[[Format], Format]:
    """Register the decorated function as the `format` of a classification task with these `attributes`."""

    def register(function: Format) -> Format:
        entry = Classification(format=function, **attributes)
        TASKS.add(entry.id, entry)
        return function

    return register


def by_label(metric: type[TaskMetric] | str) -> Callable[[Predictions, Dataset], Scores]:
    """Return the `score` of tasks that compare one prediction a row with the row's label.

    Args:
        metric: a class of metrics, or the name of one in `tasks.metrics`, which is imported with scikit-learn when the
            first score is computed.
    """

    def score(predictions: Predictions, rows: Dataset) -> Scores:
        from camex_ft.tasks import metrics

        kind: type[TaskMetric] = getattr(metrics, metric) if isinstance(metric, str) else metric
        columns = {"predictions": predictions, "references": rows["label"][:]}
        if "groups" in kind.inputs:
            columns["groups"] = rows["group"][:]
        return dict(kind().compute(**columns) or {})

    return score


def _format_batch(
    function: Format, columns: tuple[str, ...], batch: Mapping[str, list[Any]]
) -> dict[str, list[Any]]:
    columns_of_rows: dict[str, list[Any]] = {column: [] for column in columns}
    for values in zip(*batch.values(), strict=True):
        example = dict(zip(batch, values, strict=True))
        shared = {"group": str(example["idx"]), "idx": example["idx"], "domain": example.get("domain")}
        for row in function(example):
            full = {"text_pair": None, **shared, **row}
            for column in columns:
                columns_of_rows[column].append(full[column])
    return columns_of_rows
