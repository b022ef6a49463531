"""A split as one stream of text, its tokens, and the blocks and windows that a language model reads of them.

rows        "= Title =\\n"  ""  "One line .\\n"  ...      lines or whole documents
text        "= Title =\\n\\nOne line .\\n"               each ends in a line feed, a blank one is nothing else
blocks      [0, B) [B, 2B) [2B, 3B) ...                training
windows     [0, B) [S, B + S) [2S, B + 2S) ...         evaluation: each scores what the one before has not
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 2**21  # characters that are tokenised as one text; longer ones are cut after a line
TOGETHER = 8  # chunks that are tokenised at the same time, on several cores


class Window(NamedTuple):
    """Tokens [start, end) of a stream, of which the first `context` are not scored."""

    start: int
    end: int
    context: int


def line(row: str) -> str:
    """Return a row of the data as it stands in the stream: the hub's rows and the lines of the raw file agree."""
    return f"{row.removesuffix(chr(10))}\n" if row.strip() else "\n"


def text(rows: Iterable[str]) -> str:
    """Return the stream of text that `rows` make."""
    return "".join(map(line, rows))


def chunks(stream: str, size: int = CHUNK) -> Iterator[str]:
    """Yield `stream` in pieces of at least `size` characters, save the last one; each but that ends a line."""
    start = 0
    while start < len(stream):
        end = stream.find("\n", start + size - 1) + 1 or len(stream)
        yield stream[start:end]
        start = end


def tokens(stream: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the token ids of `stream`; [n], int32.

    No special token is added, save a begin token before the first one where the tokenizer begins a text with it, as
    Llama's does and GPT-2's does not. The text is never read as special tokens.
    """
    made = [np.asarray(begin(tokenizer), dtype=np.int32)]
    pieces = list(chunks(stream))
    for start in range(0, len(pieces), TOGETHER):
        ids = tokenizer(
            pieces[start : start + TOGETHER],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        made += [np.asarray(each, dtype=np.int32) for each in ids]
    return np.concatenate(made)


def begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the begin token with which the tokenizer begins a text, in a list, or an empty list."""
    first = tokenizer("a")["input_ids"][:1]
    return list(first) if first and first == [tokenizer.bos_token_id] else []


def blocks(length: int, size: int) -> list[Window]:
    """Return consecutive blocks of `size` tokens; a shorter last one is left out, unless it is the only one."""
    whole = [Window(start, start + size, 0) for start in range(0, length - size + 1, size)]
    return whole or [Window(0, length, 0)]


def windows(length: int, size: int, step: int) -> list[Window]:
    """Return windows of `size` tokens (one of `length`, where that is less), in which each token but the first is
    scored once.

    Every window but the first scores `step` tokens after as many others as it has room for; the last one scores what is
    left.

    Args:
        length: tokens of the stream.
        size: tokens of a window.
        step: tokens that a window scores; at least 1 and less than `size`, as a token needs one before it.
    """
    if not 1 <= step < size:
        raise ValueError(f"windows of {size} tokens can't step by {step}")
    made = [Window(0, min(size, length), 1)]
    while (done := made[-1].end) < length:
        end = min(done + step, length)
        made.append(Window(end - size, end, done - (end - size)))
    return made
