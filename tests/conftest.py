"""Options of the whole suite, and its environment."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from tests.helpers import own_environment

own_environment.use()  # here, since libraries read it when they are imported


def pytest_collection_finish() -> None:
    """Take what collection has made out of garbage collection: the Trainer collects at each start, 0.3 s a time."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of golden files for tests/invariants/test_golden.py",
    )
