"""The table of records, and the committed tables in docs/results.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from camex_ft.errors import UserError
from camex_ft.results.record import Record, load_record
from camex_ft.results.tables import HEAD, beside, of_folders, read_records, table

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "results" / "records"
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
TABLES = re.findall(r"<!-- ((?!end)[\w -]+) -->", PAGE)


def committed() -> Record:
    return load_record(RECORDS / "minilm-sst2" / "dense-seed0.json")


def made(protocol: str, seed: int, best: float | None) -> Record:
    record = committed()
    metrics = record.metrics.model_copy(update={"best": best, "last": best})
    return record.model_copy(update={"protocol": protocol, "seed": seed, "metrics": metrics})


def test_mean_spread_and_difference_from_the_baseline() -> None:
    rows = table([made("ties", 1, 0.9), made("dense", 0, 0.8), made("ties", 0, 0.7), made("dense", 1, 0.8)])
    assert rows[0] == HEAD
    assert [row[0] for row in rows[1:]] == ["`dense`", "`ties`"]
    assert rows[1][1:5] == ("0, 1", "80.00 ± 0.00", "80.00 ± 0.00", "")
    # sample standard deviation of 70 and 90: sqrt(200)
    assert rows[2][1:5] == ("0, 1", "80.00 ± 14.14", "80.00 ± 14.14", "+0.00")


def test_ways_to_run_one_protocol_have_rows_of_their_own() -> None:
    records = []
    for angle, best in ((0.5, 0.9), (0.0, 0.7), (0.5, 0.8)):
        record = made("namex-full", len(records), best)
        merging = {**record.config["merging"], "options": {"angle": angle}}
        records.append(record.model_copy(update={"config": {**record.config, "merging": merging}}))
    rows = table([made("dense", 0, 0.8), *records])
    assert [row[:3] for row in rows[2:]] == [
        ("`namex-full` options.angle 0", "1", "70.00"),
        ("`namex-full` options.angle 0.5", "0, 2", "85.00 ± 7.07"),
    ]


def test_a_perplexity_stands_as_it_is() -> None:
    """It is no fraction; that less of it is better does not turn the difference over."""
    records = []
    for record in (made("dense", 0, 20.5), made("ties", 0, 18.25)):
        metrics = record.metrics.model_copy(update={"primary": "perplexity", "greater_is_better": False})
        records.append(record.model_copy(update={"metrics": metrics}))
    rows = table(records)
    assert rows[1][2:5] == ("20.50", "20.50", "")
    assert rows[2][2:5] == ("18.25", "18.25", "-2.25")


def test_score_that_is_not_a_number_is_left_out() -> None:
    rows = table([made("dense", 0, 0.8), made("dense", 1, None), made("ties", 0, None)])
    assert rows[1][2] == "80.00"
    assert rows[2][2:5] == ("", "", "")


def test_records_of_different_data_do_not_share_a_table() -> None:
    other = made("ties", 0, 0.9)
    other = other.model_copy(update={"data": other.data.model_copy(update={"sha256": "0" * 64})})
    with pytest.raises(UserError, match="sha256"):
        table([made("dense", 0, 0.8), other])


def test_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no records"):
        read_records(tmp_path)


@pytest.mark.parametrize("names", TABLES)
def test_committed_table_is_that_of_the_committed_records(names: str) -> None:
    found = re.search(rf"<!-- {names} -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    assert found is not None and found.group(1) == of_folders([RECORDS / name for name in names.split()])


def test_all_committed_records_are_in_a_table() -> None:
    assert {name for names in TABLES for name in names.split()} == {path.name for path in RECORDS.iterdir()}


def test_tables_side_by_side() -> None:
    first = table([made("dense", 0, 0.8), made("ties", 0, 0.9)])
    second = table([made("dense", 0, 0.5)])
    rows = beside({"a": first, "b": second})
    assert rows[0][:6] == ("protocol", "a: best epoch", "difference", "time", "memory", "b: best epoch")
    assert rows[1][1] == "80.00" and rows[1][5] == "50.00"
    assert rows[2][:3] == ("`ties`", "90.00", "+10.00") and rows[2][5:] == ("", "", "", "")
