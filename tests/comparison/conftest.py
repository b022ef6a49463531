"""A folder to write specifications in, and a machine that needs nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from camex_ft.comparison.cells import Comparison, make_comparison
from camex_ft.comparison.spec import read_spec
from camex_ft.config import Environment

CPU = Environment(
    cuda=lambda: False,
    hub=lambda: False,
    model=lambda name: False,
    architecture=lambda name: False,
    data=lambda name, configuration: False,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[..., Path]:
    """Write a specification below the working folder and return its path, as a user would type it."""

    def write(text: str, name: str = "spec.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def compared(write: Callable[..., Path]) -> Callable[..., Comparison]:
    """Return the comparison that a specification makes on a machine without a GPU."""

    def compared(text: str, **options: object) -> Comparison:
        return make_comparison(read_spec(write(text)), **{"environment": CPU, "name": "spec", **options})

    return compared
