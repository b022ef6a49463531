"""The tables of docs/results.md and the figures of docs/statistics.md are those that the code gives now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from camex_ft.results.page import BLOCK, folders_of, refresh
from camex_ft.results.simulation import bootstrap_alarms, false_alarms, power_table

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "results" / "records"
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
STATISTICS = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")


def blocks(page: str) -> dict[str, str]:
    return {block["names"]: block["text"] for block in BLOCK.finditer(page)}


def test_committed_tables_are_those_of_the_committed_records() -> None:
    """Else: python -m camex_ft.results.page docs/results.md results/records"""
    made = blocks(refresh(RESULTS, RECORDS))
    assert blocks(RESULTS) == made
    assert len(made) > 5 and made["legend"].startswith("±")


def test_all_committed_records_are_in_a_table() -> None:
    assert folders_of(RESULTS, RECORDS) == {path.name for path in RECORDS.iterdir()}


def test_only_tables_are_written_anew() -> None:
    page = "a\n<!-- qa-squad -->\nstale\n<!-- end -->\nb\n<!-- nothing -->\nkept\n<!-- end -->\n<!-- remark -->\n"
    made = refresh(page, RECORDS)
    assert "stale" not in made and "| `ties-ca` | 42 |" in made
    assert made.startswith("a\n<!-- qa-squad -->\n") and made.endswith(page.partition("b\n")[2])
    assert refresh(made, RECORDS) == made


def test_power_of_the_page_is_that_of_the_code() -> None:
    assert blocks(STATISTICS)["power"] == power_table()


@pytest.mark.parametrize(("column", "rate"), [(3, false_alarms), (8, bootstrap_alarms)])
def test_simulated_rates_of_the_page_are_those_of_the_code(column: int, rate: object) -> None:
    """Of normal noise and five seeds; two tenths of a point are for another version of NumPy's generator."""
    assert callable(rate)
    (line,) = re.findall(r"^\| normal \|.*$", blocks(STATISTICS)["alarms"], flags=re.MULTILINE)
    said = float(line.split("|")[column + 1].strip().rstrip("%"))
    assert said == pytest.approx(100 * rate(5, trials=10_000), abs=0.2)
