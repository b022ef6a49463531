"""SuperGLUE's tasks whose rows are candidates: COPA's choices, MultiRC's answers, ReCoRD's entities.

The model classifies every candidate as right (class 1) or wrong (class 0); decisions compare the rows of a group.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from camex_ft.tasks.base import WITHHELD, Example, Predictions, Row
from camex_ft.tasks.superglue import BOOLEAN, jsonl, superglue, texts

if TYPE_CHECKING:
    from datasets import Dataset

    from camex_ft.tasks.metrics import Scores

PLACEHOLDER = "@placeholder"
HIGHLIGHT = "@highlight"
QUESTIONS = ("cause", "effect")


def members(rows: Dataset) -> list[list[int]]:
    """Return the row numbers of every group, in order of first occurrence."""
    from camex_ft.tasks.metrics import members_of

    return list(members_of(rows["group"][:]).values())


def best_rows(logits: np.ndarray, rows: Dataset) -> list[int]:
    """Return the row with the greatest margin for class 1 of every group, in order of first occurrence.

    margin = logits[:, 1] - logits[:, 0] orders rows as the probability of class 1 does; ties go to the first row.
    """
    margin = logits[:, 1] - logits[:, 0]
    return [group[int(np.argmax(margin[group]))] for group in members(rows)]


def one_a_group(rows: Dataset) -> Dataset:
    """Return the first row of every group, in order of first occurrence."""
    return rows.select([group[0] for group in members(rows)])


# COPA


def choice(logits: np.ndarray, rows: Dataset) -> list[int]:
    """Return the choice (0 or 1) with the greater margin of every example."""
    numbers = rows["choice"][:]
    return [numbers[row] for row in best_rows(logits, rows)]


def choice_score(predictions: Predictions, rows: Dataset) -> Scores:
    """Return the accuracy over examples, two rows each."""
    from camex_ft.tasks.metrics import Accuracy

    numbers, labels = rows["choice"][:], rows["label"][:]
    right = [next((numbers[row] for row in group if labels[row] == 1), WITHHELD) for group in members(rows)]
    return dict(Accuracy().compute(predictions=predictions, references=right) or {})


def choice_fault(example: Example) -> str | None:
    """Return the fault of the question word, or None."""
    if example["question"] in QUESTIONS:
        return None
    return f"column 'question' is '{example['question']}'; expected 'cause' or 'effect'"


@superglue(
    "copa",
    "COPA",
    "which of two choices is the premise's cause or effect?",
    columns=texts("premise", "choice1", "choice2", "question"),
    labels=("choice1", "choice2"),
    label_names=BOOLEAN,
    extra={"choice": "int64"},
    grouped=True,
    check=choice_fault,
    decide=choice,
    score=choice_score,
    primary="accuracy",
    lines=lambda predictions, rows: jsonl(predictions, one_a_group(rows)),
)
def copa(example: Example) -> list[Row]:
    """Format the two choices, the question's word after the premise."""
    text, right, rows = f"{example['premise']} What was the {example['question']}?", example["label"], []
    for number in (0, 1):
        label = WITHHELD if right == WITHHELD else int(right == number)
        pair = example[f"choice{number + 1}"]
        rows.append({"text": text, "text_pair": pair, "label": label, "choice": number})
    return rows


# MultiRC


def unpack_multirc(record: Example) -> list[Row]:
    """Return the examples of one paragraph of the benchmark's own jsonl file."""
    passage = record["passage"]
    return [
        {
            "paragraph": passage["text"],
            "question": question["question"],
            "answer": answer["text"],
            "idx": {"paragraph": record["idx"], "question": question["idx"], "answer": answer["idx"]},
            "label": answer.get("label"),
        }
        for question in passage["questions"]
        for answer in question["answers"]
    ]


def multirc_lines(predictions: Predictions, rows: Dataset) -> Iterator[str]:
    """Yield one line a paragraph, its questions and their answers nested as in the benchmark's files."""
    paragraphs: dict[int, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for idx, label in zip(rows["idx"][:], predictions, strict=True):
        paragraphs[idx["paragraph"]][idx["question"]].append({"idx": idx["answer"], "label": label})
    for paragraph, by_question in paragraphs.items():
        questions = [{"idx": question, "answers": answers} for question, answers in by_question.items()]
        yield json.dumps({"idx": paragraph, "passage": {"questions": questions}})


@superglue(
    "multirc",
    "MultiRC",
    "is the answer to a question on the paragraph right?",
    columns=texts("paragraph", "question", "answer"),
    idx=dict.fromkeys(("paragraph", "question", "answer"), "int32"),
    labels=BOOLEAN,
    unpack=unpack_multirc,
    grouped=True,
    numbered=False,
    metric="QuestionF1",
    lines=multirc_lines,
)
def multirc(example: Example) -> list[Row]:
    """Format one answer; answers to the same question share a group."""
    pair, idx = f"{example['question']} {example['answer']}", example["idx"]
    row = {"text": example["paragraph"], "text_pair": pair, "label": example["label"]}
    return [{**row, "group": f"{idx['paragraph']}-{idx['question']}"}]


# ReCoRD


def unpack_record(record: Example) -> list[Row]:
    """Return the examples of one passage of the benchmark's own jsonl file; an entity's end is its last character."""
    passage = record["passage"]
    spans = [passage["text"][entity["start"] : entity["end"] + 1] for entity in passage["entities"]]
    return [
        {
            "passage": passage["text"],
            "query": query["query"],
            "entities": sorted(set(spans)),
            "answers": sorted({answer["text"] for answer in query.get("answers", ())}),
            "idx": {"passage": record["idx"], "query": query["idx"]},
        }
        for query in record["qas"]
    ]


def entity(logits: np.ndarray, rows: Dataset) -> list[str]:
    """Return the text of the entity with the greatest margin of every query."""
    candidates = rows["candidate"][:]
    return [candidates[row] for row in best_rows(logits, rows)]


def entity_score(predictions: Predictions, rows: Dataset) -> Scores:
    """Return F1 and exact match over queries, best of their gold answers."""
    from camex_ft.tasks.metrics import AnswerF1

    golds = one_a_group(rows)["answers"][:]
    return dict(AnswerF1().compute(predictions=predictions, references=golds) or {})


def record_lines(predictions: Predictions, rows: Dataset) -> Iterator[str]:
    """Yield one line a query: its number and the text that fills the placeholder."""
    for idx, text in zip(one_a_group(rows)["idx"][:], predictions, strict=True):
        yield json.dumps({"idx": idx["query"], "label": text})


def record_fault(example: Example) -> str | None:
    """Return the fault of a query or its candidates, or None."""
    if PLACEHOLDER not in example["query"]:
        return f"column 'query' has no '{PLACEHOLDER}'"
    if not example["entities"]:
        return "column 'entities' is empty; expected the candidates that fill the query"
    return None


def plain(passage: str) -> str:
    """Return a passage as one text, with its highlights as sentences."""
    parts = [part.strip() for part in passage.split(HIGHLIGHT)]
    return " ".join(
        part if part.endswith((".", "!", "?", '"', "'")) else f"{part}." for part in parts if part
    )


@superglue(
    "record",
    "ReCoRD",
    "which of the passage's entities fills the query's gap?",
    columns={**texts("passage", "query"), "entities": ["string"], "answers": ["string"]},
    idx=dict.fromkeys(("passage", "query"), "int32"),
    labels=None,
    label_names=BOOLEAN,
    extra={"candidate": "string", "answers": ["string"]},
    unpack=unpack_record,
    grouped=True,
    check=record_fault,
    decide=entity,
    score=entity_score,
    primary="average",
    lines=record_lines,
)
def record(example: Example) -> list[Row]:
    """Format every entity in the query's gap; its label is whether it is an answer, or withheld without answers."""
    passage, answers = plain(example["passage"]), example["answers"]
    return [
        {
            "text": passage,
            "text_pair": example["query"].replace(PLACEHOLDER, candidate),
            "label": int(candidate in answers) if answers else WITHHELD,
            "group": f"{example['idx']['passage']}-{example['idx']['query']}",
            "candidate": candidate,
            "answers": answers,
        }
        for candidate in example["entities"]
    ]
