"""Question answering, text to text on encoder-decoder models: SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018).

The input is a question and a window of its context, the target an answer or `NO_ANSWER` (`text_to_text`).

Training: a window with the whole first gold answer has it as its target. A window without any part of it has the
target `NO_ANSWER`, as all windows of a question without an answer have. The share of windows without an answer is
therefore the same as in evaluation, and the two scores there are comparable. A window that cuts the answer apart is
left out, since either target would be wrong. An answer that every window cuts is longer than `doc_stride`.

Evaluation: every window is answered, and `choose_answers` chooses among them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from camex_ft.tasks.base import IGNORED, Example, Predictions, Row, map_rows, write_submission
from camex_ft.tasks.text_to_text import (
    ENCODED,
    NO_ANSWER,
    QuestionAnsweringConfig,
    TextToText,
    Windows,
    as_answer,
    choose_answers,
    decode_texts,
    encode_texts,
    generate_answers,
    log_probabilities,
    model_inputs,
    repeat_labels,
    target_tokens,
)
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import TASKS

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from camex_ft.tasks.metrics import Scores, TaskMetric

TEXT, NUMBER = "string", "int32"
ANSWERS = {"text": [TEXT], "answer_start": [NUMBER]}
SQUAD = {**dict.fromkeys(["id", "title", "context", "question"], TEXT), "answers": ANSWERS}
NONE: Mapping[str, Any] = {"text": [], "answer_start": []}


@dataclass(frozen=True, kw_only=True, eq=False)
class Answering(TextToText):
    """A task whose answers are spans of a context, generated as text.

    Attributes:
        optional: whether a question may have no answer.
    """

    optional: bool

    def rows(self, dataset: Dataset, split: str) -> Dataset:
        """Return the questions, in the examples' order.

        Columns: id, question, context (str), answers (list of str), start and end of the first answer in the context's
        characters (int, -1 where there is none), and domain (int) if the data set has it.
        """
        domain = {"domain": NUMBER} if "domain" in dataset.column_names else {}
        features: dict[str, Any] = {**dict.fromkeys(["id", "question", "context"], TEXT), "answers": [TEXT]}
        features |= {"start": NUMBER, "end": NUMBER, **domain}
        return map_rows(dataset, _row, features, f"{self.id}: rows of {split}")

    def encode(
        self, rows: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, settings: QuestionAnsweringConfig
    ) -> Dataset:
        """Return the windows of the rows, in order, with ``row`` and, unless answers are withheld, ``labels``.

        Raises:
            UserError: `max_length` and `doc_stride` leave no room, or no window can be trained on.
        """
        windows = Windows(tokenizer, max_length=settings.max_length, doc_stride=settings.doc_stride)
        features: dict[str, Any] = {**ENCODED, "row": NUMBER}
        labelled, training = self.labelled(rows), split == self.splits["train"]
        if labelled:
            features["labels"] = ["int64"]

        def encode_batch(batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            encoded: dict[str, list[Any]] = {name: [] for name in features}
            columns = (batch[name] for name in ("question", "context", "start", "end"))
            for row, question, context, start, end in zip(indices, *columns, strict=True):
                for window in windows.cut(question, context):
                    whole, part = window.holds(start, end), window.touches(start, end)
                    if start >= 0 and training and part and not whole:
                        continue
                    encoded["row"].append(row)
                    encoded["input_ids"].append(window.input_ids)
                    encoded["attention_mask"].append([1] * len(window.input_ids))
                    if labelled:
                        text = context[start:end] if start >= 0 and whole else NO_ANSWER
                        encoded["labels"].append(target_tokens(text, tokenizer, settings.answer_length))
            return encoded

        inputs = map_rows(rows, encode_batch, features, "tokens", batched=True, with_indices=True)
        if len(inputs) == 0:
            raise UserError(
                f"{self.id}: no window of {settings.max_length} tokens holds a whole answer of the {split} split; "
                "expected a larger task.max_length or task.doc_stride"
            )
        return inputs

    def outputs(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        tokenizer: PreTrainedTokenizerBase,
        settings: QuestionAnsweringConfig,
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
        """Return the loss, and of each window the answer in UTF-8 [B, bytes] and scores [B, 1 or 2].

        Scores are log p of the answer and, if questions may have none, of `NO_ANSWER`. The last forward pass is that
        over input and generated answer.
        """
        import torch

        loss = None
        others: list[Tensor] = []
        if inputs.get("labels") is not None:
            loss = model(**model_inputs(inputs), labels=inputs["labels"]).loss
        if self.optional:
            none = target_tokens(NO_ANSWER, tokenizer, settings.answer_length)
            others = [log_probabilities(model, inputs, repeat_labels(none, inputs))]
        answers = generate_answers(
            model, inputs, tokenizer, length=settings.answer_length, beams=settings.beams
        )
        scores = torch.stack([log_probabilities(model, inputs, answers), *others], dim=-1)
        texts = tokenizer.batch_decode(
            answers.masked_fill(answers == IGNORED, int(tokenizer.eos_token_id)), skip_special_tokens=True
        )
        return loss, (encode_texts(texts).to(scores.device), scores)

    def predict(self, outputs: Any, rows: Dataset, origin: np.ndarray | None = None) -> list[str]:
        """Return the answer to each question; the empty text for none."""
        texts, scores = outputs
        if origin is None or len(origin) != len(scores):
            raise ValueError(f"{self.id} needs the row of each of the {len(scores)} windows")
        return choose_answers(
            [as_answer(text) for text in decode_texts(texts)],
            scores[:, 0],
            origin,
            len(rows),
            none_scores=scores[:, 1] if self.optional else None,
        )

    def metrics(self, outputs: Any, rows: Dataset, origin: np.ndarray | None = None) -> Scores:
        """Return exact_match and f1, in SQuAD 2.0 also those of questions with and without an answer."""
        self.check_labelled(rows)
        predictions = self.predict(outputs, rows, origin)
        return dict(self._metric().compute(predictions=predictions, references=rows["answers"][:]) or {})

    def correct(self, outputs: Any, rows: Dataset, origin: np.ndarray | None = None) -> np.ndarray:
        """Return the mask of questions with an exact answer."""
        metric = self._metric()
        pairs = zip(self.predict(outputs, rows, origin), rows["answers"][:], strict=True)
        scores = [
            metric.score(predictions=[answer], references=[golds])["exact_match"] for answer, golds in pairs
        ]
        return np.asarray(scores) == 1

    def _metric(self) -> TaskMetric:
        """Return the metric of SQuAD's version."""
        from camex_ft.tasks.metrics import SquadAnswers, SquadAnswersOrNone

        return SquadAnswersOrNone() if self.optional else SquadAnswers()

    def labelled(self, rows: Dataset) -> bool:
        """Return whether all rows have answers; if questions may have none, whether any row has."""
        answerable = [bool(golds) for golds in rows["answers"][:]]
        return any(answerable) if self.optional else all(answerable)

    def submission(self, predictions: Predictions, rows: Dataset, path: str | Path) -> None:
        """Write the JSON object that SQuAD's scripts read: id to answer, the empty text for none."""
        by_id = dict(zip(rows["id"][:], predictions, strict=True))
        write_submission(path, json.dumps(by_id, ensure_ascii=False, indent=1) + "\n")


def unpack(record: Example) -> list[Row]:
    """Return the questions of SQuAD's own JSON: the whole file's object, or an article of its list ``data``."""
    rows = []
    for article in record.get("data", [record]):
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                golds = [] if asked.get("is_impossible") is True else asked.get("answers", [])
                row = {"id": asked["id"], "title": article.get("title", ""), "context": paragraph["context"]}
                answers = {name: [gold[name] for gold in golds] for name in ANSWERS}
                rows.append({**row, "question": asked["question"], "answers": answers})
    return rows


def _row(example: Example) -> Row:
    golds, context = example["answers"], example["context"]
    places = [place_of(context, *gold) for gold in zip(golds["text"], golds["answer_start"], strict=True)]
    start, end = (places[0] if places else None) or (-1, -1)
    shared = {name: example[name] for name in ("id", "question", "context")}
    domain = {"domain": example["domain"]} if "domain" in example else {}
    return {**shared, "answers": golds["text"], "start": start, "end": end, **domain}


def place_of(context: str, text: str, start: int) -> tuple[int, int] | None:
    """Return the characters [start, end) of an answer in `context`, or None if it is not at `start`.

    Blanks around an answer do not count, and those inside may differ in number and kind, as in real data.
    """
    words = r"\s+".join(re.escape(word) for word in text.split())
    if not words or not 0 <= start < len(context):
        return None
    match = re.compile(rf"\s*({words})").match(context, start)
    return (match.start(1), match.end(1)) if match else None


def answer_fault(example: Example) -> str | None:
    """Return the fault of an example's answers, or None."""
    context, golds = example["context"], example["answers"]
    if not context.strip():
        return "column 'context' is blank; expected the text with the answer"
    texts, starts = golds["text"], golds["answer_start"]
    if len(texts) != len(starts):
        return f"column 'answers' has {len(texts)} texts and {len(starts)} of answer_start; expected as many of either"
    for text, start in zip(texts, starts, strict=True):
        if not text.strip():
            return "column 'answers' has a blank text; expected words of the context"
        if place_of(context, text, start) is None:
            return _elsewhere(context, text, start)
    return None


def _elsewhere(context: str, text: str, start: int) -> str:
    there = context[max(start, 0) : max(start, 0) + len(text)]
    at = context.find(text.strip())
    hint = f"it is at {at}" if at >= 0 else "it is nowhere in the context"
    return (
        f"answer {_short(text)}: answer_start is {start}, where the context ({len(context)} characters) has "
        f"{_short(there)}; expected the answer's first character, counted from 0; {hint}"
    )


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "..."


def squad(name: str, benchmark_name: str, summary: str, **attributes: Any) -> None:
    """Register a version of SQuAD."""
    entry = Answering(
        suite="qa",
        name=name,
        benchmark_name=benchmark_name,
        summary=summary,
        hub=f"rajpurkar/{name}",
        features=SQUAD,
        primary="exact_match",
        texts=("question", "context"),
        check=answer_fault,
        unpack=unpack,
        unique="id",
        absent={"answers": NONE},
        unpublished=("test",),
        files={"test": f"{benchmark_name}.json"},
        **attributes,
    )
    TASKS.add(entry.id, entry)


squad(
    "squad",
    "SQuAD",
    "which words of the passage answer the question?",
    optional=False,
    hub_config="plain_text",
    stems={"train": ("train-v1.1",), "validation": ("dev-v1.1",)},
)
squad(
    "squad_v2",
    "SQuAD2",
    "the same, where the passage may hold no answer",
    optional=True,
    answered=False,
    stems={"train": ("train-v2.0",), "validation": ("dev-v2.0",)},
)
