"""Places of answers in a context, and faults of them."""

from __future__ import annotations

import re
from typing import Any

from camex_ft.tasks.base import Example


def place(context: str, text: str, start: int) -> tuple[int, int] | None:
    """Return the characters [start, end) of `context` that are the answer, or None where it is not there.

    Blanks around an answer have no part in it, and those inside may differ in number and kind, as in real data.
    """
    words = r"\s+".join(re.escape(word) for word in text.split())
    if not words or not 0 <= start < len(context):
        return None
    found = re.compile(rf"\s*({words})").match(context, start)
    return (found.start(1), found.end(1)) if found else None


def fault(example: Example) -> str | None:
    """Return what is wrong with the answers of an example, or None."""
    context, golds = example["context"], example["answers"]
    if not context.strip():
        return "column 'context' is blank; expected the text that the question is about"
    texts, starts = golds["text"], golds["answer_start"]
    if len(texts) != len(starts):
        return f"column 'answers' has {len(texts)} texts and {len(starts)} of answer_start; expected as many of either"
    for text, start in zip(texts, starts, strict=True):
        if not text.strip():
            return "column 'answers' has a blank text; expected words of the context"
        if place(context, text, start) is None:
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
