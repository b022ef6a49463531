"""Names of tasks by kind, for the tests of what all tasks of a kind have in common."""

from __future__ import annotations

from camex_ft.tasks.base import Task
from camex_ft.tasks.classification import Classification
from camex_ft.utils.registry import TASKS


def of_kind(kind: type[Task]) -> list[str]:
    """Names of the registered tasks of one kind."""
    return [name for name in TASKS.names() if isinstance(TASKS.get(name), kind)]


def of_suite(suite: str) -> list[str]:
    """Names of the registered tasks of one suite, without it."""
    return [name.removeprefix(f"{suite}/") for name in TASKS.names() if name.startswith(f"{suite}/")]


CLASSIFICATION = of_kind(Classification)
