"""SuperGLUE's tasks of one row an example, and its diagnostic sets (Wang et al. 2019, arXiv 1905.00537).

Schemas are those of ``aps/super_glue``. The tasks whose examples are several rows are in `superglue_candidates`,
those that mark spans in `superglue_spans`. Where the paper reports two metrics, the primary one is their mean,
``average``, as in the benchmark's own score.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value

from camex_ft.tasks.base import Example, Predictions, Row
from camex_ft.tasks.classification import Format, by_label, task
from camex_ft.tasks.glue import sentences
from camex_ft.tasks.metrics import Accuracy, AccuracyMacroF1, GenderParity, Matthews

BOOLEAN = ("False", "True")
ENTAILMENT = ("entailment", "not_entailment")
CB_LABELS = ("entailment", "contradiction", "neutral")
RTE_SPLITS = {"train": "train", "validation": ("validation",), "test": ("test",)}


def jsonl(predictions: Iterable[Any], rows: Dataset) -> Iterator[str]:
    """Yield the lines of a SuperGLUE submission: idx and label of every row."""
    for idx, label in zip(rows["idx"][:], predictions, strict=True):
        yield json.dumps({"idx": idx, "label": label})


def jsonl_of(names: tuple[str, ...]) -> Callable[[Predictions, Dataset], Iterator[str]]:
    """Return `lines` for tasks whose submissions hold `names` in place of class ids."""
    return lambda predictions, rows: jsonl((names[p] for p in predictions), rows)


def superglue(
    name: str,
    benchmark_name: str,
    summary: str,
    *,
    columns: dict[str, Any],
    labels: tuple[str, ...] | None,
    idx: Any = Value("int32"),  # noqa: B008
    **attributes: Any,
) -> Callable[[Format], Format]:
    """Return the decorator that registers a `format` as a SuperGLUE task with these columns and dataset labels.

    `labels` None is for data sets without a label column; `attributes` are those of `Classification`.
    """
    last = {"label": ClassLabel(names=list(labels))} if labels else {}
    words = tuple(column for column, kind in columns.items() if kind == Value("string"))
    defaults = {
        "label_names": labels,
        "files": {"test": f"{benchmark_name}.jsonl"},
        "texts": words if len(words) == 2 else ("first text", "second text"),
    }
    return task(
        suite="superglue",
        name=name,
        benchmark_name=benchmark_name,
        summary=summary,
        hub="aps/super_glue",
        features=Features({**columns, "idx": idx, **last}),
        **{**defaults, **attributes},
    )


def texts(*columns: str) -> dict[str, Any]:
    """Return the features of text columns."""
    return {column: Value("string") for column in columns}


superglue(
    "boolq",
    "BoolQ",
    "does the passage answer the question with yes?",
    columns=texts("question", "passage"),
    labels=BOOLEAN,
    score=by_label(Accuracy),
    primary="accuracy",
    lines=jsonl_of(("false", "true")),
)(sentences("passage", "question"))
superglue(
    "cb",
    "CB",
    "is the premise's speaker committed to the hypothesis?",
    columns=texts("premise", "hypothesis"),
    labels=CB_LABELS,
    score=by_label(AccuracyMacroF1),
    primary="average",
    lines=jsonl_of(CB_LABELS),
)(sentences("premise", "hypothesis"))
superglue(
    "rte",
    "RTE",
    "does the premise entail the hypothesis?",
    columns=texts("premise", "hypothesis"),
    labels=ENTAILMENT,
    score=by_label(Accuracy),
    primary="accuracy",
    lines=jsonl_of(ENTAILMENT),
)(sentences("premise", "hypothesis"))
superglue(
    "axb",
    "AX-b",
    "broad-coverage diagnostics, by a model trained on rte",
    columns=texts("sentence1", "sentence2"),
    labels=ENTAILMENT,
    score=by_label(Matthews),
    primary="matthews",
    splits=RTE_SPLITS,
    train_from="superglue/rte",
    lines=jsonl_of(ENTAILMENT),
)(sentences("sentence1", "sentence2"))


@superglue(
    "axg",
    "AX-g",
    "Winogender minimal pairs, by a model trained on rte",
    columns=texts("premise", "hypothesis"),
    labels=ENTAILMENT,
    grouped=True,
    score=by_label(GenderParity),
    primary="accuracy",
    splits=RTE_SPLITS,
    train_from="superglue/rte",
    lines=jsonl_of(ENTAILMENT),
)
def winogender(example: Example) -> list[Row]:
    """Format a sentence pair; its minimal pair, the other gender's premise, is its neighbour: rows 0 and 1, 2 and 3."""
    pair = f"pair-{example['idx'] // 2}"
    return [
        {
            "text": example["premise"],
            "text_pair": example["hypothesis"],
            "label": example["label"],
            "group": pair,
        }
    ]
