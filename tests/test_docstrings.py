"""Docstrings of the package and its scripts begin as those of PyTorch and transformers do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "camex_ft").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])
# An imperative verb or a noun phrase says more than a question that the docstring answers.
QUESTIONS = ("What", "Where", "Whether", "How", "Why", "When", "Which")


def questions(source: str) -> list[str]:
    """Names of the modules, classes and functions whose docstring begins with a question word."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    begins = {
        getattr(node, "name", "module"): (ast.get_docstring(node) or "").split(" ")[0] for node in nodes
    }
    return [name for name, word in begins.items() if word in QUESTIONS]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_docstring_begins_with_a_question_word(file: Path) -> None:
    assert questions(file.read_text(encoding="utf-8")) == []


def test_a_question_word_is_found_in_every_kind_of_docstring() -> None:
    source = (
        '"""What it is."""\nclass A:\n    """How it is."""\n    def f(self):\n        """Whether it is."""\n'
    )
    assert questions(source) == ["module", "A", "f"]
