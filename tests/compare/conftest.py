"""A folder to write specifications in, and a machine that needs nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from camex_ft.compare.cells import Cell, Comparison, make_comparison
from camex_ft.compare.spec import read_spec
from camex_ft.config import config_hash
from camex_ft.results.entries import Result
from camex_ft.results.record import load_record
from tests.helpers.machines import machine
from tests.helpers.working_folder import folder, writer

__all__ = ["folder"]

RECORD = Path(__file__).resolve().parents[2] / "results" / "records" / "minilm-sst2" / "dense-seed0.json"

CPU = machine()


@pytest.fixture
def write(folder: Path) -> Callable[..., Path]:
    """Write a specification below the working folder."""
    return writer("spec.yaml")


@pytest.fixture
def compared(write: Callable[..., Path]) -> Callable[..., Comparison]:
    """Return the comparison that a specification makes on a machine without a GPU."""

    def compared(text: str, **options: object) -> Comparison:
        return make_comparison(read_spec(write(text)), **{"environment": CPU, "name": "spec", **options})

    return compared


def _run_of(cell: Cell, *, sha: str = "aa", started: str = "2026-01-01T00:00:00+00:00", seconds: float = 1.0):
    """A finished run of a cell, on data with this fingerprint."""
    record = load_record(RECORD)
    name = f"any--thing--{config_hash(cell.settled, data=sha)}"
    return Result(
        record=record.model_copy(
            update={
                "task": cell.task,
                "protocol": cell.settled.merging.protocol,
                "seed": cell.seed,
                "run": record.run.model_copy(update={"name": name, "started": started, "seconds": seconds}),
                "data": record.data.model_copy(update={"sha256": sha}),
            }
        )
    )


@pytest.fixture
def run_of() -> Callable[..., Result]:
    """Make a finished run of a cell."""
    return _run_of
