"""SuperGLUE's tasks of one row an example, and its diagnostic sets (Wang et al. 2019, arXiv 1905.00537).

Schemas are those of ``aps/super_glue``. The tasks whose examples are several rows are in `superglue_candidates`. If the
paper reports two metrics, the primary one is their mean, ``average``, as in the benchmark's own score.

WiC and WSC ask about spans, which are marked in the text, ``* noun *`` and ``# pronoun #``, with blanks inside so that
marks are tokens. Rows also hold the character ranges of the marked spans (`marked`, `marked_pair`: lists of [start,
end)), by which `encoding` retains them when a text is too long.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from camex_ft.tasks.base import Example, Predictions, Row
from camex_ft.tasks.classification import Format, task
from camex_ft.tasks.glue import ENTAILMENT, sentences

if TYPE_CHECKING:
    from datasets import Dataset

RANGES = [["int32"]]
SPANS = ("span1_index", "span2_index")
PLACES = ("start1", "start2", "end1", "end2")
WORD, NOUN, PRONOUN = "*", "*", "#"
BOOLEAN = ("False", "True")
CB_LABELS = ("entailment", "contradiction", "neutral")
PREMISE_HYPOTHESIS = sentences("premise", "hypothesis")
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
    idx: Any = "int32",
    **attributes: Any,
) -> Callable[[Format], Format]:
    """Return the decorator that registers a `format` as a SuperGLUE task with these columns and dataset labels.

    `labels` None is for data sets without a label column; `attributes` are those of `Classification`. Submissions hold
    the labels' names.
    """
    last = {"label": labels} if labels else {}
    words = tuple(column for column, kind in columns.items() if kind == "string")
    defaults = {
        "label_names": labels,
        "lines": jsonl_of(labels or ()),
        "files": {"test": f"{benchmark_name}.jsonl"},
        "texts": words if len(words) == 2 else ("first text", "second text"),
    }
    return task(
        suite="superglue",
        name=name,
        benchmark_name=benchmark_name,
        summary=summary,
        hub="aps/super_glue",
        features={**columns, "idx": idx, **last},
        **{**defaults, **attributes},
    )


def texts(*columns: str) -> dict[str, Any]:
    """Return the features of text columns."""
    return dict.fromkeys(columns, "string")


superglue(
    "boolq",
    "BoolQ",
    "does the passage answer the question with yes?",
    columns=texts("question", "passage"),
    labels=BOOLEAN,
    metric="Accuracy",
    lines=jsonl_of(("false", "true")),
)(sentences("passage", "question"))
superglue(
    "cb",
    "CB",
    "is the premise's speaker committed to the hypothesis?",
    columns=texts("premise", "hypothesis"),
    labels=CB_LABELS,
    metric="AccuracyMacroF1",
)(PREMISE_HYPOTHESIS)
superglue(
    "rte",
    "RTE",
    "does the premise entail the hypothesis?",
    columns=texts("premise", "hypothesis"),
    labels=ENTAILMENT,
    metric="Accuracy",
)(PREMISE_HYPOTHESIS)
superglue(
    "axb",
    "AX-b",
    "broad-coverage diagnostics, by a model trained on rte",
    columns=texts("sentence1", "sentence2"),
    labels=ENTAILMENT,
    metric="Matthews",
    splits=RTE_SPLITS,
    train_from="superglue/rte",
)(sentences("sentence1", "sentence2"))


@superglue(
    "axg",
    "AX-g",
    "Winogender minimal pairs, by a model trained on rte",
    columns=texts("premise", "hypothesis"),
    labels=ENTAILMENT,
    grouped=True,
    metric="GenderParity",
    splits=RTE_SPLITS,
    train_from="superglue/rte",
)
def winogender(example: Example) -> list[Row]:
    """Format a sentence pair; its minimal pair, the other gender's premise, is its neighbour: rows 0 and 1, 2 and 3."""
    return [{**row, "group": f"pair-{example['idx'] // 2}"} for row in PREMISE_HYPOTHESIS(example)]


# WiC and WSC


def mark(text: str, spans: Sequence[tuple[int, int, str]]) -> tuple[str, list[list[int]]]:
    """Return `text` with marks around its spans, and the character ranges of span and marks in the result.

    Args:
        text: the text as it stands.
        spans: (start, end, mark) in characters, end exclusive.
    """
    opening = [(start, 1, f"{sign} ", i) for i, (start, _, sign) in enumerate(spans)]
    closing = [(end, 0, f" {sign}", i) for i, (_, end, sign) in enumerate(spans)]
    pieces: list[str] = []
    ranges = [[0, 0] for _ in spans]
    last = length = 0
    for position, opens, sign, i in sorted(opening + closing):
        pieces += [text[last:position], sign]
        before = length + position - last
        length, last = before + len(sign), position
        ranges[i][1 - opens] = before if opens else length
    return "".join(pieces) + text[last:], ranges


def wic_fault(example: Example) -> str | None:
    """Return the fault of the word's places, or None."""
    for n in (1, 2):
        start, end, length = example[f"start{n}"], example[f"end{n}"], len(example[f"sentence{n}"])
        if start is None or end is None or not 0 <= start < end <= length:
            expected = f"0 <= start < end <= {length}, the length of 'sentence{n}'"
            return f"columns 'start{n}', 'end{n}' are {start}, {end}; expected {expected}"
    return None


@superglue(
    "wic",
    "WiC",
    "does the word mean the same in both sentences?",
    columns={**texts("word", "sentence1", "sentence2"), **dict.fromkeys(PLACES, "int32")},
    labels=BOOLEAN,
    extra={"marked": RANGES, "marked_pair": RANGES},
    check=wic_fault,
    metric="Accuracy",
    lines=jsonl_of(("false", "true")),
)
def wic(example: Example) -> list[Row]:
    """Format the two sentences with the word marked in each; start and end are characters, end exclusive."""
    (first, marked), (second, marked_pair) = (
        mark(example[f"sentence{n}"], [(example[f"start{n}"], example[f"end{n}"], WORD)]) for n in (1, 2)
    )
    ranges = {"marked": marked, "marked_pair": marked_pair}
    return [{"text": first, "text_pair": second, "label": example["label"], **ranges}]


def span_of(text: str, index: int, span: str) -> tuple[int, int]:
    """Return the characters of a span that starts at word number `index`; words are separated by blanks.

    If the text there differs from `span` (some of the benchmark's spans differ in case, punctuation or blanks), it is
    as many words as `span` has, without punctuation at their end.
    """
    words = list(re.finditer(r"\S+", text))
    start = words[index].start()
    if text[start : start + len(span)].lower() == span.lower():
        return start, start + len(span)
    last = words[min(index + max(len(span.split()), 1), len(words)) - 1]
    return start, last.start() + max(len(last.group().rstrip(".,;:!?")), 1)


def wsc_fault(example: Example) -> str | None:
    """Return the fault of the spans' places, or None."""
    count = len(example["text"].split())
    for n in (1, 2):
        start = example[f"span{n}_index"]
        if start is None or not 0 <= start < count:
            return f"column 'span{n}_index' is {start}; expected the number of a word of 'text', 0 to {count - 1}"
    return None


def unpack_wsc(record: Example) -> list[Row]:
    """Return the example of one record of the benchmark's own jsonl file, whose spans are nested."""
    return [{**record, **record["target"]}]


@superglue(
    "wsc",
    "WSC",
    "does the pronoun refer to the noun phrase?",
    columns={**texts("text"), **dict.fromkeys(SPANS, "int32"), **texts("span1_text", "span2_text")},
    labels=BOOLEAN,
    extra={"marked": RANGES},
    unpack=unpack_wsc,
    check=wsc_fault,
    metric="Accuracy",
    texts=("text",),
)
def wsc(example: Example) -> list[Row]:
    """Format the text with the noun phrase and the pronoun marked."""
    text = example["text"]
    noun, pronoun = (span_of(text, example[f"span{n}_index"], example[f"span{n}_text"]) for n in (1, 2))
    marked_text, ranges = mark(text, [(*noun, NOUN), (*pronoun, PRONOUN)])
    return [{"text": marked_text, "label": example["label"], "marked": ranges}]
