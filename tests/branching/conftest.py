"""A folder to write specifications in, and the study that one makes on a machine that needs nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from camex_ft.branching.stages import Study, make_study
from camex_ft.branching.study import read_study
from tests.helpers.machines import machine
from tests.helpers.working_folder import folder, writer

__all__ = ["folder"]


@pytest.fixture
def write(folder: Path) -> Callable[..., Path]:
    """Write a specification below the working folder."""
    return writer("spec.yaml")


@pytest.fixture
def planned(write: Callable[..., Path]) -> Callable[..., Study]:
    """Return the study that a specification makes on a machine without a GPU."""

    def planned(text: str, **options: object) -> Study:
        return make_study(read_study(write(text)), **{"environment": machine(), "name": "spec", **options})

    return planned
