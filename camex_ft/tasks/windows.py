"""Contexts that do not fit are cut into windows, neighbours sharing some tokens.

A model input is ``question: Q context: W``, where W is a window of the context. The question is in every window. It is
cut only where it alone would leave the context less than half of the input: then it keeps its first tokens, where
English questions say what they ask for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from camex_ft.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST = 8  # tokens of context below which no window makes sense


@dataclass(frozen=True)
class Window:
    """One model input.

    Attributes:
        input_ids: its tokens, special ones included.
        start, end: the characters of the context that it holds, [start, end).
    """

    input_ids: list[int]
    start: int
    end: int

    def holds(self, start: int, end: int) -> bool:
        """Return whether all of the context's characters [start, end) are in the window."""
        return self.start <= start and end <= self.end

    def touches(self, start: int, end: int) -> bool:
        """Return whether any of them is."""
        return self.start < end and start < self.end


class Layout:
    """Texts with a word before each, such as ``question: Q context: C``, as tokens with the special ones around.

    Args:
        tokenizer: the backbone's.
        labels: the words, one for each text.
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
        """Return the tokens of all texts. The last one loses its last tokens where they do not fit.

        Each text before it keeps at most half of the room that is left when its turn comes.
        """
        room, kept = self.room, []
        for i, text in enumerate(texts, start=1):
            kept.append(self.ids(text.strip())[: room if i == len(texts) else room // 2])
            room -= len(kept[-1])
        return self.join(kept)

    def join(self, texts: Sequence[Sequence[int]]) -> list[int]:
        """Return the tokens of all texts with their words and the special tokens."""
        body = [token for label, ids in zip(self.labels, texts, strict=True) for token in (*label, *ids)]
        return [*self.before, *body, *self.after]

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, none of them special."""
        return list(self._encode(text)["input_ids"])

    def tokens(self, text: str) -> tuple[list[int], Sequence[tuple[int, int]]]:
        """Return the tokens of a text and the characters [start, end) that each stands for."""
        found = self._encode(text, return_offsets_mapping=True)
        return list(found["input_ids"]), found["offset_mapping"]

    def _encode(self, text: str, **options: Any) -> Mapping[str, Any]:
        # verbose: a context longer than the backbone's limit is what windows are for
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
        self.layout = Layout(tokenizer, ("question:", "context:"), max_length=max_length)
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
        ids, offsets = self.layout.tokens(context)
        room = self.layout.room - len(asked)
        windows = []
        for first, last in _ranges(len(ids), room, room - self.doc_stride):
            start = offsets[first][0] if first else 0
            end = offsets[last - 1][1] if last < len(ids) else len(context)
            windows.append(Window(self.layout.join([asked, ids[first:last]]), start, end))
        return windows


def _ranges(length: int, room: int, step: int) -> list[tuple[int, int]]:
    """Return token ranges [first, last) of at most `room`, each `step` after the one before, until `length`."""
    ranges = [(0, min(room, length))]
    while ranges[-1][1] < length:
        first = ranges[-1][0] + step
        ranges.append((first, min(first + room, length)))
    return ranges


def _specials(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    first = next(i for i in range(len(whole)) if whole[i : i + len(text)] == text)
    return list(whole[:first]), list(whole[first + len(text) :])
