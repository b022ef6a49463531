"""A folder to write configurations in, and machines to resolve them on."""

from __future__ import annotations

from pathlib import Path

import machines
import pytest


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(folder):
    """Write a file below the working folder and return its path, as a user would type it."""

    def write(text: str, name: str = "run.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def machine():
    """Make an environment that answers as told."""
    return machines.machine
