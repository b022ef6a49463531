"""The nine GLUE tasks and its diagnostic set (Wang et al. 2019, arXiv 1804.07461); schemas of ``nyu-mll/glue``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from camex_ft.tasks.base import Example, Predictions, Row
from camex_ft.tasks.classification import Format, task

if TYPE_CHECKING:
    from datasets import Dataset

NLI = ("entailment", "neutral", "contradiction")
ENTAILMENT = ("entailment", "not_entailment")
MATCHED = {
    "train": "train",
    "validation": ("validation_matched", "validation_mismatched"),
    "test": ("test_matched", "test_mismatched"),
}


def sentences(first: str, second: str | None = None) -> Format:
    """Return the format of plain tasks: one row, whose texts are these columns as they stand."""

    def rows(example: Example) -> list[Row]:
        pair = example[second] if second else None
        return [{"text": example[first], "text_pair": pair, "label": example["label"]}]

    return rows


def tsv(values: Iterable[Any], rows: Dataset) -> Iterator[str]:
    """Yield the lines of a GLUE submission: a header, then index and prediction of every row."""
    yield "index\tprediction"
    for idx, value in zip(rows["idx"][:], values, strict=True):
        yield f"{idx}\t{value}"


def names_of(names: tuple[str, ...]) -> Any:
    """Return `lines` for the tasks whose submissions hold the label's name."""
    return lambda predictions, rows: tsv((names[p] for p in predictions), rows)


def real_number(logits: np.ndarray, rows: Dataset) -> list[float]:
    """Return the one output of every row of a regression. logits: [rows, 1]."""
    return [float(value) for value in logits[:, 0]]


def similarity(predictions: Predictions, rows: Dataset) -> Iterator[str]:
    """Return `lines` for STS-B, whose scores lie between 0 and 5."""
    return tsv((f"{min(max(value, 0.0), 5.0):.3f}" for value in predictions), rows)


def glue(
    name: str,
    benchmark_name: str,
    summary: str,
    *,
    columns: tuple[str, ...],
    labels: tuple[str, ...] | None,
    aliases: Mapping[str, str] | None = None,
    **attributes: Any,
) -> None:
    """Register a GLUE task whose texts are `columns`. GLUE's own files call the column ``idx`` ``index``."""
    features = {**dict.fromkeys(columns, "string"), "label": labels or "float32", "idx": "int32"}
    defaults = {"lines": tsv, "files": {"test": f"{benchmark_name}.tsv"}}
    register = task(
        suite="glue",
        name=name,
        benchmark_name=benchmark_name,
        summary=summary,
        hub="nyu-mll/glue",
        features=features,
        label_names=labels,
        aliases={"idx": "index", **(aliases or {})},
        texts=columns,
        **{**defaults, **attributes},
    )
    register(sentences(*columns))


glue(
    "cola",
    "CoLA",
    "is the sentence acceptable English?",
    columns=("sentence",),
    labels=("unacceptable", "acceptable"),
    metric="Matthews",
    headerless=("source", "label", "star", "sentence"),
)
glue(
    "sst2",
    "SST-2",
    "is the film review's sentence positive?",
    columns=("sentence",),
    labels=("negative", "positive"),
    metric="Accuracy",
)
glue(
    "mrpc",
    "MRPC",
    "do the two news sentences mean the same?",
    columns=("sentence1", "sentence2"),
    labels=("not_equivalent", "equivalent"),
    metric="AccuracyF1",
    aliases={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
)
glue(
    "qqp",
    "QQP",
    "do the two questions ask the same?",
    columns=("question1", "question2"),
    labels=("not_duplicate", "duplicate"),
    metric="AccuracyF1",
    aliases={"label": "is_duplicate", "idx": "id"},
)
glue(
    "stsb",
    "STS-B",
    "how similar are the two sentences, from 0 to 5?",
    columns=("sentence1", "sentence2"),
    labels=None,
    metric="Correlation",
    aliases={"label": "score"},
    label_range=(0.0, 5.0),
    decide=real_number,
    lines=similarity,
)
glue(
    "mnli",
    "MNLI",
    "does the premise entail or contradict the hypothesis?",
    columns=("premise", "hypothesis"),
    labels=NLI,
    metric="Accuracy",
    aliases={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
    splits=MATCHED,
    files={"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
    lines=names_of(NLI),
)
glue(
    "qnli",
    "QNLI",
    "does the sentence answer the question?",
    columns=("question", "sentence"),
    labels=ENTAILMENT,
    metric="Accuracy",
    lines=names_of(ENTAILMENT),
)
glue(
    "rte",
    "RTE",
    "does the first text entail the second?",
    columns=("sentence1", "sentence2"),
    labels=ENTAILMENT,
    metric="Accuracy",
    lines=names_of(ENTAILMENT),
)
glue(
    "wnli",
    "WNLI",
    "does the text with its pronoun replaced follow?",
    columns=("sentence1", "sentence2"),
    labels=("not_entailment", "entailment"),
    metric="Accuracy",
)
glue(
    "ax",
    "AX",
    "GLUE's diagnostic set, by a model trained on mnli",
    columns=("premise", "hypothesis"),
    labels=NLI,
    metric="Matthews",
    aliases={"premise": "sentence1", "hypothesis": "sentence2"},
    splits={**MATCHED, "test": ("test",)},
    train_from="glue/mnli",
    lines=names_of(NLI),
)
