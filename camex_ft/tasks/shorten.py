"""Shortening a text so that its marked spans stay."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Span = Sequence[int]


def keep_spans(text: str, spans: Sequence[Span], room: int, count: Callable[[str], int]) -> str:
    """Return the words of `text` nearest to a marked span, as many as fit, in their order.

    A word's distance is the number of words from it to the nearest span, 0 inside one; of words at the same distance
    the earlier one stays longer. Where even the spans do not fit, their words stay in order as far as they do.

    Args:
        text: words separated by blanks.
        spans: [start, end) in characters.
        room: greatest value of `count` that fits.
        count: size of a text, growing with its words, such as its number of tokens.
    """
    if count(text) <= room:
        return text
    words = list(re.finditer(r"\S+", text))
    inside = [
        i for i, w in enumerate(words) if any(w.start() < end and w.end() > start for start, end in spans)
    ]
    order = sorted(range(len(words)), key=lambda i: (min((abs(i - j) for j in inside), default=i), i))
    low, high = 0, len(words) - 1  # `low` words are known to fit, more than `high` are known not to
    while low < high:
        middle = (low + high + 1) // 2
        if count(_join(words, order[:middle])) <= room:
            low = middle
        else:
            high = middle - 1
    return _join(words, order[:low])


def _join(words: Sequence[re.Match[str]], kept: Sequence[int]) -> str:
    return " ".join(words[i].group() for i in sorted(kept))
