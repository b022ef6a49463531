"""What tests of several benchmarks need."""

from __future__ import annotations

import pytest

from camex_ft.estimate.measured import reset_peak


@pytest.fixture
def resettable():
    """Skip where a peak can only be bounded."""
    if not reset_peak():
        pytest.skip("this system cannot set a process's peak memory back")
