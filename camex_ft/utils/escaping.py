"""Text of users and models made safe for where it is shown: terminal, Markdown, LaTeX, HTML, CSV.

Names of rows, protocols, labels and files come from configurations, records and folders of other people. Each function
returns text that its place shows as it is, and neither runs nor takes for markup of its own.
"""

from __future__ import annotations

import html as standard
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Rows = list[tuple[str, ...]]

# control characters but tab and line feed, other line ends, changes of direction, halves of surrogate pairs
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
CODE = re.compile("`([^`]*)`")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
MARKDOWN = re.compile(r"[\\`*_~|<\[\]$]|&(?=#?\w+;)")
BLOCK = re.compile(r"^(?:#|>|[-+=](?=[\s=-]|$)|\d+[.)])")  # what begins a heading, a quotation or a list
LATEX = {
    **{sign: rf"\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "`": r"\textasciigrave{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "−": "$-$",
}


def printable(text: str) -> str:
    """Return text with control characters written out, such as ``\\x1b``; tabs and line feeds stay."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Return text on one line: each run of white space becomes a space, other control characters are written out."""
    return printable(" ".join(text.split()))


def say(console: Console, text: str) -> None:
    """Print lines to a console as they are: without markup, colours or folding."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def markdown(text: str, *, begins: bool = False) -> str:
    """Return text as one line of Markdown, or a part of it, in a table's cell too.

    With `begins` it begins a line, where ``#``, ``>``, ``-`` and ``1.`` would mean something.
    """
    escaped = _escaped(one_line(text))
    if begins and (block := BLOCK.match(escaped)):
        return f"{block[0][:-1]}\\{escaped[block.end() - 1 :]}"
    return escaped


def markdown_code(text: str) -> str:
    """Return text as inline code of Markdown, in a table's cell too."""
    text = one_line(text)
    if not text:
        return ""
    if not set(text) & set("`|"):
        return f"`{text}`"
    # a backtick would end it and a bar the cell; character references mean neither
    return f"<code>{re.sub(r'[^A-Za-z0-9 ]', lambda match: f'&#{ord(match[0])};', text)}</code>"


def markdown_cell(text: str) -> str:
    """Return text that is Markdown already as one cell of a table."""
    return re.sub(r"(?<!\\)\|", r"\\|", one_line(text))


def markdown_notes(text: str) -> str:
    """Return a sentence, with names in backticks, as one line of Markdown."""
    parts = CODE.split(one_line(text))  # text and code in turns
    return "".join(markdown_code(part) if n % 2 else _escaped(part) for n, part in enumerate(parts))


def _escaped(text: str) -> str:
    return MARKDOWN.sub(lambda match: "\\" + match[0], text)


def quoted(name: str) -> str:
    """Return a name in backticks, as part of a sentence for `markdown_notes`, `latex_notes` or `html_notes`."""
    return f"`{one_line(name).replace('`', chr(39))}`"


def latex(text: str) -> str:
    """Return text for LaTeX."""
    return "".join(LATEX.get(sign, sign) for sign in one_line(text))


def latex_notes(text: str) -> str:
    """Return a sentence, with names in backticks, for LaTeX; the backticks go."""
    return latex(CODE.sub(r"\1", text))


def html(text: str) -> str:
    """Return text for HTML, between tags or in an attribute with quotes."""
    return standard.escape(printable(text))


def html_notes(text: str) -> str:
    """Return a sentence, with names in backticks, for HTML."""
    return CODE.sub(r"<code>\1</code>", html(text))


def csv_text(value: object) -> object:
    """Return a cell of a CSV file: a text that a spreadsheet would take for a formula gets an apostrophe before it.

    Values that are not text stay as they are.
    """
    if not isinstance(value, str):
        return value
    return ("'" if value.lstrip(" ").startswith(FORMULA) else "") + printable(value)


def print_rows(headings: tuple[str, ...], rows: Rows, *, console: Console) -> None:
    """Print rows under headings: a table on a terminal; elsewhere one line a row, in columns, never cut or folded."""
    rows = [tuple(map(one_line, row)) for row in rows]
    if console.is_terminal:
        from rich.table import Table
        from rich.text import Text

        table = Table(*headings)
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    for row in [headings, *rows]:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        say(console, line)
    console.print()
