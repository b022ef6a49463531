"""Machines to resolve configurations on."""

from __future__ import annotations

import pytest

from tests.helpers import machines
from tests.helpers.working_folder import folder, writer

__all__ = ["folder"]


@pytest.fixture
def write(folder):
    """Write a configuration below the working folder."""
    return writer("run.yaml")


@pytest.fixture
def machine():
    """Make an environment that answers as told."""
    return machines.machine
