"""Detection of quotation marks that quote the fields of a tsv file, as pandas and spreadsheets write them.

In GLUE's own files they are text. They quote where both of these hold, and are text in every other file:

- Every field with a mark begins and ends with one, and those inside are doubled; read so, all rows have as many fields.
- A quoted field has to be quoted: it holds a mark, or a tab or line break without which rows differ in their number of
  fields (or have one alone). Or every field of the first row is quoted.

A mark in the middle of a text, or one that has no other, therefore turns quoting off for its file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

MARK = '"'
FIELD = re.compile(r'("[^"]*(?:""[^"]*)*"|[^"\t\r\n]*)(\t|\r\n|\r|\n|\Z)')  # and what ends it
BREAK = re.compile(r"[\t\r\n]")
LINE_END = re.compile(r"\r\n|\r|\n")
LOOKS_QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"')


def quoted(text: str) -> bool:
    """Return whether the fields of a tsv file are quoted.

    Args:
        text: the whole file.
    """
    if MARK not in text:
        return False
    first: list[str] = []
    marks = breaks = False
    for row in _rows(text):
        first = first or row or []
        if row is None or len(row) != len(first):
            return False
        inside = [field[1:-1] for field in row if field.startswith(MARK)]
        marks |= any(MARK in field for field in inside)
        breaks |= any(BREAK.search(field) for field in inside)
    if all(field.startswith(MARK) for field in first):
        return True
    plain = {line.count("\t") for line in LINE_END.split(text) if line}
    return marks or (breaks and (len(first) == 1 or plain != {len(first) - 1}))


def doubtful(text: str, rows: Iterable[Sequence[str]]) -> tuple[int, str] | None:
    """Return number, from 1, and text of the first field that looks quoted in a file that is read without quotes.

    One with doubled marks inside does; and where no mark of the file contradicts it, one in a single pair of marks.

    Args:
        text: the whole file.
        rows: its rows, read without quotes.
    """
    if MARK not in text:
        return None
    single = all(row is not None for row in _rows(text))
    for number, row in enumerate(rows, start=1):
        for field in row:
            if LOOKS_QUOTED.fullmatch(field) and (single or MARK * 2 in field[1:-1]):
                return number, field
    return None


def _rows(text: str) -> Iterator[list[str] | None]:
    """Yield the fields of each row, with their marks, read as quoted; None, and no more, where that cannot be."""
    row: list[str] = []
    place = 0
    while place < len(text):
        found = FIELD.match(text, place)
        if found is None:
            yield None
            return
        row.append(found[1])
        place = found.end()
        if found[2] != "\t":
            if row != [""]:  # a blank line
                yield row
            row = []
    if row:  # a tab is the last character
        yield [*row, ""]
