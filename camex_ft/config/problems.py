"""Problems of a configuration, reported together, each with its place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import ErrorDetails

from camex_ft.utils.errors import UserError

Key = tuple[str, ...]
EXPECTED = {
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "string_type": "expected text",
    "string_too_short": "expected text",
    "dict_type": "expected a mapping",
    "finite_number": "expected a finite number",
    "greater_than": "expected more than {gt:g}",
    "greater_than_equal": "expected at least {ge:g}",
    "less_than": "expected less than {lt:,}",
    "less_than_equal": "expected at most {le:,}",
}


@dataclass(frozen=True, order=True)
class Origin:
    """Place where a key was written: a line of a file, or an override.

    Attributes:
        source: the file's path, or ``override 'key=value'``.
        line: line in the file, from 1; 0 for an override or for a whole file.
    """

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class Problem:
    """One thing to mend.

    Attributes:
        message: what is wrong and what was expected, without the place.
        origin: where, or None where the value comes from code or is a default.
        key: the key concerned; empty for a whole file.
    """

    message: str
    origin: Origin | None = None
    key: Key = ()

    def __str__(self) -> str:
        parts = [str(self.origin) if self.origin else "", ".".join(self.key), self.message]
        return ": ".join(part for part in parts if part)


class ConfigErrors(UserError):
    """Every problem of one configuration.

    Attributes:
        problems: in the order of files and lines.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        unique = dict.fromkeys(problems)
        self.problems: Sequence[Problem] = sorted(unique, key=lambda p: p.origin or Origin(""))
        count = len(self.problems)
        head = "The configuration has a problem" if count == 1 else f"The configuration has {count} problems"
        super().__init__("\n  ".join([f"{head}:", *map(str, self.problems)]))


def show(value: Any) -> str:
    """Return `value` as it would stand in YAML, with its kind, shortened to one line."""
    if isinstance(value, dict):
        return f"a mapping with {len(value)} keys" if value else "an empty mapping"
    text = json.dumps(value, default=str, ensure_ascii=False)
    text = text if len(text) <= 60 else text[:57] + "..."
    kinds = {bool: "", int: "", float: "", str: " (text)", list: " (a list)"}
    return "nothing (null)" if value is None else text + kinds.get(type(value), "")


def expected(detail: ErrorDetails) -> str:
    """Return what pydantic expected, in this package's words."""
    context = {
        k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in detail.get("ctx", {}).items()
    }
    return EXPECTED.get(detail["type"], detail["msg"]).format(**context)
