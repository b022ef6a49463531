"""One name for one thing: classes, modules and variables, read from the sources."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "camex_ft"
FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = {str(file.relative_to(PACKAGE)): file.read_text(encoding="utf-8") for file in FILES}
# Modules that play the same role in sibling packages: `cli` has one for each package whose commands it holds.
ROLES = {"__init__", "base"}
COMMANDS = "cli"
# Participles say what happened to a value, not which value it is.
NO_NOUNS = {"made", "found", "given", "kept", "told"}


def repeated(names: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: places for name, places in names.items() if len(places) > 1}


def test_no_two_public_classes_have_one_name():
    places = defaultdict(list)
    for name, source in SOURCES.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    assert repeated(places) == {}


def test_no_two_modules_have_one_name():
    places = defaultdict(list)
    for file in FILES:
        if file.stem not in ROLES and file.parent.name != COMMANDS:
            places[file.stem].append(str(file.relative_to(PACKAGE)))
    assert repeated(places) == {}


def variables(source: str) -> Iterator[tuple[str, int]]:
    """Every variable and parameter that a source names, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


@pytest.mark.parametrize("name", SOURCES)
def test_variables_carry_the_noun_of_what_they_hold(name):
    assert [(found, line) for found, line in variables(SOURCES[name]) if found in NO_NOUNS] == []


def test_a_variable_without_a_noun_is_seen_wherever_it_stands():
    source = "def f(given):\n    made = [kept for kept in given]\n    for found, other in made: pass\n"
    assert {name for name, _ in variables(source)} & NO_NOUNS == {"given", "made", "kept", "found"}
