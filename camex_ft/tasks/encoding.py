"""Encode rows as model inputs, without padding, which `collator` adds a batch at a time.

Texts are never read as special tokens, so a text with ``</s>`` adds no end token: every row of a task has the same
number of them, as `T5ForSequenceClassification` requires. Tokenizers without a token between the texts of a pair
(GPT-2, Qwen) get a line feed there.

Rows are padded and cut on the right, regardless of the sides that the tokenizer was saved with: heads read the first
token (BERT) or the last one that is not padding (GPT-2), and absolute positions count from the left. Causal backbones
without a padding token pad with their end token (`backbones.loading`): the attention mask hides padding, and
classification heads find it by ``config.pad_token_id``. A begin, end or padding token replaces texts without tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from camex_ft.tasks.base import Collator, labelled, map_rows
from camex_ft.utils.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

Span = Sequence[int]  # [start, end) in characters
LEAST = 8  # tokens of text below which no task makes sense


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
    features: dict[str, Any] = {name: ["int32"] for name in _names(tokenizer)}
    withheld = not labelled(rows)
    if not withheld:
        features["labels"] = rows.features["label"]
    function = partial(_encode_batch, tokenizer, max_length, room, between, withheld)
    return map_rows(rows, function, features, "tokens", batched=True, with_indices=True)


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


def _names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return list(tokenizer("a", "b"))


def _encode_batch(
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    room: int,
    between: str,
    withheld: bool,
    batch: Mapping[str, list[Any]],
    indices: Sequence[int],
) -> dict[str, list[Any]]:
    texts, pairs = list(batch["text"]), list(batch["text_pair"])
    if "marked" in batch:
        ranges = zip(batch["marked"], batch.get("marked_pair") or [[]] * len(texts), strict=True)
        short = [_shorten(tokenizer, room, *row) for row in zip(texts, pairs, ranges, strict=True)]
        texts, pairs = [text for text, _ in short], [pair for _, pair in short]
    seconds = None if pairs[0] is None else [between + pair for pair in pairs]
    with right_sided(tokenizer):
        encoded = tokenizer(texts, seconds, truncation=True, max_length=max_length, split_special_tokens=True)
    inputs = {name: encoded[name] for name in encoded}
    for place, row in enumerate(indices):
        if not inputs["input_ids"][place]:
            token = {"input_ids": _stand_in(tokenizer, row), "attention_mask": 1}
            for name, values in inputs.items():
                values[place] = [token.get(name, 0)]
    return inputs if withheld else {**inputs, "labels": list(batch["label"])}


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
