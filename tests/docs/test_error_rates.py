"""The figures of docs/statistics.md are those that the code gives now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.docs.error_rates import bootstrap_alarms, false_alarms, power_table
from scripts.docs.results_page import BLOCK

STATISTICS = (Path(__file__).resolve().parents[2] / "docs" / "statistics.md").read_text(encoding="utf-8")
BLOCKS = {block["names"]: block["text"] for block in BLOCK.finditer(STATISTICS)}


def test_power_of_the_page_is_that_of_the_code() -> None:
    assert BLOCKS["power"] == power_table()


@pytest.mark.parametrize(("column", "rate"), [(3, false_alarms), (8, bootstrap_alarms)])
def test_simulated_rates_of_the_page_are_those_of_the_code(column: int, rate: object) -> None:
    """Of normal noise and five seeds; two tenths of a point are for another version of NumPy's generator."""
    assert callable(rate)
    (line,) = re.findall(r"^\| normal \|.*$", BLOCKS["alarms"], flags=re.MULTILINE)
    said = float(line.split("|")[column + 1].strip().rstrip("%"))
    assert said == pytest.approx(100 * rate(5, trials=10_000), abs=0.2)
