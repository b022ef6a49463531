"""WikiQA (Yang et al. 2015), sentences that answer a question or do not, as a text-to-text task.

The target is one of two words. The score of a sentence is log p(yes word) - log p(no word) under teacher forcing,
without generation. Its sign is the decision, and it orders the sentences of a question.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from camex_ft.tasks.base import Predictions, map_rows, write_submission
from camex_ft.tasks.text_to_text import (
    ENCODED,
    PromptLayout,
    QuestionAnsweringConfig,
    TextToText,
    log_probabilities,
    model_inputs,
    repeat_labels,
    target_tokens,
)
from camex_ft.utils.registry import TASKS

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from camex_ft.tasks.metrics import Scores

WORDS = ("no", "yes")  # the targets of labels 0 and 1
PARTS = {"question": "question:", "document_title": "title:", "answer": "answer:"}
WIKIQA = {
    **dict.fromkeys(["question_id", "question", "document_title", "answer"], "string"),
    "label": ("0", "1"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class SentenceSelection(TextToText):
    """A task that scores sentences as answers to a question, and ranks those of one question."""

    words: ClassVar[tuple[str, ...]] = WORDS

    def rows(self, dataset: Dataset, split: str) -> Dataset:
        """Return the examples in their order with labels as numbers, -1 for withheld ones."""
        from datasets import Value

        return dataset.cast_column("label", Value("int64"))

    def encode(
        self, rows: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, settings: QuestionAnsweringConfig
    ) -> Dataset:
        """Return the tokenised rows, one for one, with ``labels`` unless they are withheld.

        In rows that are too long the sentence loses its last tokens. Question and title get up to half and a quarter of
        the room.
        """
        layout = PromptLayout(tokenizer, tuple(PARTS.values()), max_length=settings.max_length)
        known = self.labelled(rows)
        features = {**ENCODED, **({"labels": ["int64"]} if known else {})}
        targets = [target_tokens(word, tokenizer, settings.answer_length) for word in WORDS]

        def encode_row(row: Mapping[str, Any]) -> dict[str, Any]:
            ids = layout.fit([row[name] for name in PARTS])
            inputs = {"input_ids": ids, "attention_mask": [1] * len(ids)}
            return {**inputs, "labels": targets[row["label"]]} if known else inputs

        return map_rows(rows, encode_row, features, "tokens")

    def outputs(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        tokenizer: PreTrainedTokenizerBase,
        settings: QuestionAnsweringConfig,
    ) -> tuple[Tensor | None, Tensor]:
        """Return the loss and the score of each row, log p(yes word) - log p(no word); [B], float32."""
        loss = None
        if inputs.get("labels") is not None:
            loss = model(**model_inputs(inputs), labels=inputs["labels"]).loss
        words = [target_tokens(word, tokenizer, settings.answer_length) for word in WORDS]
        no, yes = (log_probabilities(model, inputs, repeat_labels(word, inputs)) for word in words)
        return loss, yes - no

    def predict(self, outputs: Any, rows: Dataset, origin: np.ndarray | None = None) -> list[float]:
        """Return the score of each sentence; a score above 0 means an answer."""
        scores = np.asarray(outputs, dtype=np.float64)
        if scores.shape != (len(rows),):
            raise ValueError(f"{self.id} needs scores [{len(rows)}], not {list(scores.shape)}")
        return [float(score) for score in scores]

    def metrics(self, outputs: Any, rows: Dataset, origin: np.ndarray | None = None) -> Scores:
        """Return accuracy and f1 of the decisions, map and mrr of the order within each question."""
        from camex_ft.tasks.metrics import RankedAnswers

        self.check_labelled(rows)
        columns = {"references": rows["label"][:], "groups": rows["question_id"][:]}
        return dict(RankedAnswers().compute(predictions=self.predict(outputs, rows), **columns) or {})

    def correct(self, outputs: Any, rows: Dataset, origin: np.ndarray | None = None) -> np.ndarray:
        """Return the mask of sentences with the right decision."""
        return (np.asarray(self.predict(outputs, rows)) > 0) == (np.asarray(rows["label"][:]) == 1)

    def submission(self, predictions: Predictions, rows: Dataset, path: str | Path) -> None:
        """Write a line a sentence: question, its place among the question's sentences from 0, decision and score.

        A question's id that holds a tab, line break or quotation mark is quoted.
        """
        seen: dict[str, int] = {}
        lines = io.StringIO()
        writer = csv.writer(lines, delimiter="\t", lineterminator="\n")
        writer.writerow(["question_id", "sentence", "label", "score"])
        for question, score in zip(rows["question_id"][:], predictions, strict=True):
            seen[question] = place = seen.get(question, -1) + 1
            writer.writerow([question, place, int(score > 0), f"{score:.6f}"])
        write_submission(path, lines.getvalue())


TASKS.add(
    "qa/wikiqa",
    SentenceSelection(
        suite="qa",
        name="wikiqa",
        benchmark_name="WikiQA",
        summary="does the sentence answer the question?",
        hub="microsoft/wiki_qa",
        hub_config="default",
        features=WIKIQA,
        primary="accuracy",
        texts=tuple(word.rstrip(":") for word in PARTS.values()),
        aliases={
            "question_id": "QuestionID",
            "question": "Question",
            "document_title": "DocumentTitle",
            "answer": "Sentence",
            "label": "Label",
        },
        stems={"train": ("WikiQA-train",), "validation": ("WikiQA-dev",), "test": ("WikiQA-test",)},
        files={"test": "WikiQA.tsv"},
    ),
)
