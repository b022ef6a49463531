"""Classification and regression of texts and pairs of texts.

A task is made of functions: from an example to the rows that the model scores, from logits to decisions, from decisions
to metrics and to the benchmark's submission file. Most examples are one row; COPA, MultiRC and ReCoRD have one row for
each candidate.

Rows are encoded without padding, which `collator` adds a batch at a time. Texts are never read as special tokens, so a
text with ``</s>`` adds no end token: every row of a task has the same number of them, as `T5ForSequenceClassification`
requires. Tokenizers without a token between the texts of a pair (GPT-2, Qwen) get a line feed there.

Rows are padded and cut on the right, regardless of the sides that the tokenizer was saved with: heads read the first
token (BERT) or the last one that is not padding (GPT-2), and absolute positions count from the left. Causal backbones
without a padding token pad with their end token (`backbones.loading`): the attention mask hides padding, and
classification heads find it by ``config.pad_token_id``. A begin, end or padding token replaces texts without tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from pydantic import Field

from camex_ft.config.schema import TaskConfig
from camex_ft.config.values import Count
from camex_ft.tasks.base import (
    Collator,
    Example,
    Predictions,
    Row,
    Task,
    labelled,
    map_rows,
    write_submission,
)
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import TASKS

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

    from camex_ft.tasks.metrics import Scores, TaskMetric

Format = Callable[[Example], list[Row]]
Span = Sequence[int]  # [start, end) in characters
LEAST = 8  # tokens of text below which no task makes sense


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
        make = owner.format

        def format_batch(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
            rows = []
            for values in zip(*batch.values(), strict=True):
                example = dict(zip(batch, values, strict=True))
                shared = {"text_pair": None, "group": str(example["idx"]), "idx": example["idx"]}
                shared["domain"] = example.get("domain")
                rows += [{**shared, **row} for row in make(example)]
            return {column: [row[column] for row in rows] for column in features}

        return map_rows(dataset, format_batch, features, f"{self.id}: rows of {split}", batched=True)

    def encode(
        self, rows: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, settings: ClassificationConfig
    ) -> Dataset:
        """Return the tokenised rows, one for one; see `encode`."""
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


# The metric of `tasks.metrics` that compares predictions with labels -> the value of it that is primary.
PRIMARY = {
    "Accuracy": "accuracy",
    "AccuracyF1": "f1",
    "AccuracyMacroF1": "average",
    "Matthews": "matthews",
    "Correlation": "spearman",
    "QuestionF1": "average",
    "GenderParity": "accuracy",
}


def task(*, metric: str | None = None, **attributes: Any) -> Callable[[Format], Format]:
    """Register the decorated function as the `format` of a classification task with these `attributes`.

    A `metric`, a key of `PRIMARY`, stands for `score` and `primary`.
    """
    if metric is not None:
        attributes = {"score": by_label(metric), "primary": PRIMARY[metric], **attributes}

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


# -- encoding ----------------------------------------------------------------------------------------------------------


def encode(rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Dataset:
    """Return the tokenised rows, in the same order: the tokenizer's inputs, and ``labels`` unless they are withheld.

    ``labels`` are int64 class ids, or float32 for regression. Rows longer than `max_length` lose tokens at the end of
    their longer text; rows with marked spans lose the words farthest from the spans first.

    Args:
        rows: the result of `Task.rows`.
        tokenizer: the backbone's.
        max_length: greatest number of tokens of a row, special tokens included.

    Raises:
        UserError: `max_length` leaves no room for text, or a row has no tokens and the tokenizer none to replace them.
    """
    pair = any(text is not None for text in rows["text_pair"][:1])
    room = max_length - tokenizer.num_special_tokens_to_add(pair=pair)
    if room < LEAST:
        raise UserError(
            f"task.max_length is {max_length}, which leaves {max(room, 0)} tokens for text; expected at least "
            f"{max_length - room + LEAST}"
        )
    between = "\n" if pair and not separates(tokenizer) else ""
    features: dict[str, Any] = {name: ["int32"] for name in tokenizer("a", "b")}
    withheld = not labelled(rows)
    if not withheld:
        features["labels"] = rows.features["label"]

    def encode_batch(batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        texts, pairs = list(batch["text"]), list(batch["text_pair"])
        if "marked" in batch:
            ranges = zip(batch["marked"], batch.get("marked_pair") or [[]] * len(texts), strict=True)
            short = [_shorten(tokenizer, room, *row) for row in zip(texts, pairs, ranges, strict=True)]
            texts, pairs = [text for text, _ in short], [pair for _, pair in short]
        seconds = None if pairs[0] is None else [between + pair for pair in pairs]
        with right_sided(tokenizer):
            encoded = tokenizer(
                texts, seconds, truncation=True, max_length=max_length, split_special_tokens=True
            )
        inputs = dict(encoded)
        for place, row in enumerate(indices):
            if not inputs["input_ids"][place]:
                token = {"input_ids": _stand_in(tokenizer, row), "attention_mask": 1}
                for name, values in inputs.items():
                    values[place] = [token.get(name, 0)]
        return inputs if withheld else {**inputs, "labels": list(batch["label"])}

    return map_rows(rows, encode_batch, features, "tokens", batched=True, with_indices=True)


def collator(tokenizer: PreTrainedTokenizerBase) -> Collator:
    """Return the collator that pads a batch on the right, to its longest row.

    Raises:
        UserError: the tokenizer has no padding token; `backbones.load` gives it one.
    """
    from transformers import DataCollatorWithPadding

    if tokenizer.pad_token_id is None:
        raise UserError(
            "the tokenizer has no padding token; load it with camex_ft.backbones.loading, or set its pad_token"
        )
    return partial(_collate, DataCollatorWithPadding(tokenizer))


def _collate(pad: DataCollatorWithPadding, rows: list[dict[str, Any]]) -> dict[str, Any]:
    with right_sided(pad.tokenizer):
        return pad(rows)


@contextmanager
def right_sided(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Make the tokenizer pad and cut on the right within the context."""
    sides = tokenizer.padding_side, tokenizer.truncation_side
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    try:
        yield
    finally:
        tokenizer.padding_side, tokenizer.truncation_side = sides


def separates(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer puts a special token between the texts of a pair."""
    return tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)


def _stand_in(tokenizer: PreTrainedTokenizerBase, row: int) -> int:
    """Return the token that replaces the texts of a row without tokens."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    raise UserError(
        f"row {row + 1} has no tokens, and the tokenizer has no begin, end or padding token to replace them; "
        "expected a text, or a tokenizer with one of these tokens"
    )


def _shorten(
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    text: str,
    pair: str | None,
    ranges: tuple[Sequence[Span], Sequence[Span]],
) -> tuple[str, str | None]:
    """Return the texts; if they exceed `room` tokens, without the words farthest from their marked spans."""

    def count(piece: str) -> int:
        return len(tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    first, second = count(text), count(pair) if pair is not None else 0
    if first + second <= room:
        return text, pair
    half = room // 2
    limits = (room, 0)
    if pair is not None:
        limits = (room - min(second, room - half), room - min(first, half))
    shorter = shorten_around_spans(text, ranges[0], limits[0], count)
    return shorter, None if pair is None else shorten_around_spans(pair, ranges[1], limits[1], count)


def shorten_around_spans(text: str, spans: Sequence[Span], room: int, count: Callable[[str], int]) -> str:
    """Return the words of `text` nearest to a marked span, as many as fit, in their order.

    A word's distance is the number of words from it to the nearest span, 0 inside one; at equal distance the earlier
    word is preferred. If even the spans do not fit, their first words are returned.

    Args:
        text: words separated by blanks.
        spans: [start, end) in characters.
        room: greatest size that fits.
        count: returns the size of a text, which grows with its words, such as its number of tokens.
    """
    if count(text) <= room:
        return text
    words = list(re.finditer(r"\S+", text))
    inside = [
        i for i, w in enumerate(words) if any(w.start() < end and w.end() > start for start, end in spans)
    ]
    order = sorted(range(len(words)), key=lambda i: (min((abs(i - j) for j in inside), default=i), i))
    low, high = 0, len(words) - 1  # `low` words fit, more than `high` do not
    while low < high:
        middle = (low + high + 1) // 2
        if count(_join(words, order[:middle])) <= room:
            low = middle
        else:
            high = middle - 1
    return _join(words, order[:low])


def _join(words: Sequence[re.Match[str]], chosen: Sequence[int]) -> str:
    return " ".join(words[i].group() for i in sorted(chosen))
