"""Text to text on encoder-decoder models: texts as tokens, contexts in windows, answers generated and scored.

A model input is ``question: Q context: W``, with W a window of the context. The question is in every window. It is cut
only if it would leave the context less than half of the input: then it keeps its first tokens, in which English
questions name what they ask for.

The score of an answer is log p(answer | window), the sum over its tokens and the end token. A sum and not a mean: it is
the logarithm of a probability, and so comparable between windows, between answers of different lengths, and with that
of `NO_ANSWER`. A mean would favour long answers, whose later tokens are mostly certain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from camex_ft.config.schema import TaskConfig
from camex_ft.config.values import Count
from camex_ft.tasks.base import IGNORED, Collator, Task
from camex_ft.tasks.classification import right_sided
from camex_ft.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEAST = 8  # tokens of text below which no input makes sense
NO_ANSWER = "no answer"  # target of a window without the answer
INPUTS = ("input_ids", "attention_mask")
ENCODED = {name: ["int32"] for name in INPUTS}


class QuestionAnsweringConfig(TaskConfig):
    """Questions and answers are texts; a long context is read in windows."""

    kind = "question answering"
    lengths = ("max_length", "answer_length")

    max_length: Count = Field(default=128, description="Longest input, in tokens.")
    doc_stride: Count = Field(
        default=128, description="Tokens that neighbouring windows of a long context share."
    )
    answer_length: Count = Field(default=32, description="Longest answer, in tokens.")
    beams: Count = Field(default=1, description="Beams when answers are generated; 1: greedy.")


@dataclass(frozen=True, kw_only=True, eq=False)
class TextToText(Task[QuestionAnsweringConfig]):
    """A task whose inputs and targets are texts, for encoder-decoder models."""

    head: ClassVar[str] = "seq2seq-lm"
    config_class: ClassVar[type[TaskConfig]] = QuestionAnsweringConfig

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """Return the collator that pads on the right, inputs with the padding token and labels with -100."""
        return partial(_collate, tokenizer)


def _collate(tokenizer: PreTrainedTokenizerBase, features: list[dict[str, Any]]) -> dict[str, Any]:
    from transformers import DataCollatorForSeq2Seq

    with right_sided(tokenizer):
        batch = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)(features)
    return {name: values for name, values in batch.items() if values is not None}


@dataclass(frozen=True)
class Window:
    """A window of a context as one model input.

    Attributes:
        input_ids: its tokens, special ones included.
        start, end: the characters of the context in it, [start, end).
    """

    input_ids: list[int]
    start: int
    end: int

    def holds(self, start: int, end: int) -> bool:
        """Return whether all of the context's characters [start, end) are in the window."""
        return self.start <= start and end <= self.end

    def touches(self, start: int, end: int) -> bool:
        """Return whether any of the context's characters [start, end) is in the window."""
        return self.start < end and start < self.end


class PromptLayout:
    """PromptLayout of texts with a label before each, such as ``question: Q context: C``, between special tokens.

    Args:
        tokenizer: the backbone's.
        labels: the labels, one for each text.
        max_length: tokens of a model input, special ones included.

    Raises:
        UserError: `max_length` has no room for texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], *, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.before, self.after = _specials(tokenizer)
        self.labels = [self.ids(text) for text in labels]
        fixed = len(self.before) + len(self.after) + sum(map(len, self.labels))
        self.room = max_length - fixed
        if self.room < 2 * LEAST:
            raise UserError(
                f"task.max_length is {max_length}, which leaves {max(self.room, 0)} tokens for text; expected at "
                f"least {fixed + 2 * LEAST}"
            )

    def fit(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens of all texts, without the last tokens of texts that do not fit.

        The last text gets the room that is left, each text before it at most half of what is left at its turn.
        """
        room, fitting = self.room, []
        for i, text in enumerate(texts, start=1):
            fitting.append(self.ids(text.strip())[: room if i == len(texts) else room // 2])
            room -= len(fitting[-1])
        return self.join(fitting)

    def join(self, texts: Sequence[Sequence[int]]) -> list[int]:
        """Return the tokens of all texts with their labels and the special tokens."""
        body = [token for label, ids in zip(self.labels, texts, strict=True) for token in (*label, *ids)]
        return [*self.before, *body, *self.after]

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, none of them special."""
        return list(self._encode(text)["input_ids"])

    def pieces(
        self, text: str, *, room: int, stride: int
    ) -> list[tuple[list[int], Sequence[tuple[int, int]]]]:
        """Cut a text into pieces of at most `room` tokens, neighbours sharing `stride`; at least one.

        Returns:
            the tokens of each piece, and the characters [start, end) of each token.
        """
        with right_sided(self.tokenizer):
            cut = self._encode(
                text,
                truncation=True,
                max_length=room,
                stride=stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
        return list(zip(cut["input_ids"], cut["offset_mapping"], strict=True))

    def _encode(self, text: str, **options: Any) -> Mapping[str, Any]:
        # verbose: a warning of a long context is of no use, since windows cut it
        return self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False, **options
        )


class Windows:
    """Cuts examples into windows of at most `max_length` tokens.

    Args:
        tokenizer: a fast one, whose tokens know their characters.
        max_length: tokens of a model input, special ones included.
        doc_stride: tokens of the context that neighbouring windows share.

    Raises:
        UserError: the tokenizer is a slow one, `max_length` has no room, or with `doc_stride` and the longest
            question a window would not go on where the one before it ends.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, doc_stride: int) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                "question answering needs a fast tokenizer, whose tokens know their characters; "
                f"{type(tokenizer).__name__} is a slow one. Expected a backbone with a tokenizer.json"
            )
        self.layout = PromptLayout(tokenizer, ("question:", "context:"), max_length=max_length)
        self.doc_stride, self.question_room = doc_stride, self.layout.room // 2
        least = self.layout.room - self.question_room
        if doc_stride >= least:
            raise UserError(
                f"task.doc_stride is {doc_stride}: with the longest question, of {self.question_room} tokens, a window "
                f"of {max_length} has {least} tokens of context, and the next one would not go on. Expected "
                f"task.doc_stride below {least}, or a larger task.max_length"
            )

    def cut(self, question: str, context: str) -> list[Window]:
        """Return the windows of one example, from the context's beginning to its end; at least one."""
        asked = self.layout.ids(question.strip())[: self.question_room]
        pieces = self.layout.pieces(context, room=self.layout.room - len(asked), stride=self.doc_stride)
        windows = []
        for i, (ids, offsets) in enumerate(pieces):
            start = offsets[0][0] if i else 0
            end = offsets[-1][1] if i + 1 < len(pieces) else len(context)
            windows.append(Window(self.layout.join([asked, ids]), start, end))
        return windows


def _specials(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    first = next(i for i in range(len(whole)) if whole[i : i + len(text)] == text)
    return list(whole[:first]), list(whole[first + len(text) :])


def target_tokens(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    """Return the tokens of `text` and the end token, at most `length` in all; a longer text loses its last tokens."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids[: length - 1], int(tokenizer.eos_token_id)]


def repeat_labels(ids: Sequence[int], inputs: Mapping[str, Tensor]) -> Tensor:
    """Return `ids` as the labels of every row of a batch; [B, L]."""
    import torch

    first = inputs["input_ids"]
    return torch.tensor(ids, device=first.device).repeat(len(first), 1)


def log_probabilities(model: PreTrainedModel, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Return log p(labels | input) of every row, the sum over its tokens, under teacher forcing; [B], float32.

    Args:
        model: an encoder-decoder model.
        inputs: of a batch; `INPUTS` are read.
        labels: tokens with the end token; [B, L], padded with -100.
    """
    logits, counted = model(**model_inputs(inputs), labels=labels).logits, labels != IGNORED
    chosen = logits.float().log_softmax(-1).gather(-1, labels.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    return (chosen * counted).sum(-1)


def generate_answers(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    beams: int,
) -> Tensor:
    """Return the generated answers as labels: tokens with the end token, then -100; [B, L], L at most `length`.

    Greedy, or the best of `beams`. An answer without an end after `length` - 1 tokens is ended there, so that its
    probability is that of a whole answer. Of a checkpoint's own generation settings only token ids count.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    settings = GenerationConfig(
        max_new_tokens=length,
        num_beams=beams,
        do_sample=False,
        use_cache=True,
        forced_eos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=own.decoder_start_token_id if own is not None else None,
    )
    generated: Any = model.generate(**model_inputs(inputs), generation_config=settings)  # type: ignore[operator]
    ids: Tensor = generated[:, 1:]  # without the start token
    ended = (ids == tokenizer.eos_token_id).cumsum(-1) - (ids == tokenizer.eos_token_id).long()
    return ids.masked_fill(ended > 0, IGNORED)


def model_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs of the encoder."""
    return {name: inputs[name] for name in INPUTS if name in inputs}


def encode_texts(texts: Sequence[str]) -> Tensor:
    """Encode texts in UTF-8, a row each, padded with -100; int64, [B, greatest number of bytes, at least 1]."""
    import torch

    rows = [list(text.encode()) for text in texts]
    width = max([1, *map(len, rows)])
    return torch.tensor([row + [IGNORED] * (width - len(row)) for row in rows], dtype=torch.int64)


def decode_texts(rows: np.ndarray) -> list[str]:
    """Decode the rows of `encode_texts`."""
    return [bytes(row[row >= 0].astype(np.uint8).tolist()).decode() for row in rows]


def as_answer(text: str) -> str:
    """Return a generated text as an answer: without blanks around it, and empty for `NO_ANSWER`."""
    return "" if " ".join(text.split()) == NO_ANSWER else text.strip()


def choose_answers(
    texts: Sequence[str],
    scores: np.ndarray,
    origin: np.ndarray,
    count: int,
    *,
    none_scores: np.ndarray | None = None,
) -> list[str]:
    """Return the answer of each example, chosen among those of its windows; the empty text is no answer.

    Of the windows with an answer the one with the greatest score wins, the first one among equals. With `none_scores`
    an example has no answer if the score of none is greater still. That score is the least one of its windows, since
    an example has no answer only if none of its windows has one.

    Args:
        texts: the answer of each window, as `as_answer` returns it.
        scores: its log-probability; [windows].
        origin: the example that each window belongs to; [windows].
        count: number of examples.
        none_scores: log-probability of `NO_ANSWER` in each window; None where every question has an answer.
    """
    best = np.full(count, -np.inf)
    least = np.full(count, np.inf)
    chosen = [""] * count
    for window, (text, row) in enumerate(zip(texts, origin, strict=True)):
        if none_scores is not None:
            least[row] = min(least[row], none_scores[window])
        if text and (scores[window] > best[row] or not chosen[row]):
            best[row], chosen[row] = scores[window], text
    if none_scores is None:
        return chosen
    return ["" if none > score else text for text, none, score in zip(chosen, least, best, strict=True)]
