"""Finished runs from folders, and the rows that they fill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from camex_ft.results.entries import Result, entries_of, keep_entries, keep_result, read_results, row_label
from camex_ft.results.record import Record, load_record
from camex_ft.results.run_folder import RunFolder
from camex_ft.utils.errors import UserError

RECORD = Path(__file__).resolve().parents[2] / "results" / "records" / "minilm-sst2" / "dense-seed0.json"


def made(protocol: str, seed: int, **merging: Any) -> Result:
    record: Record = load_record(RECORD)
    config = {**record.config, "merging": {**record.config["merging"], **merging}}
    record = record.model_copy(update={"protocol": protocol, "seed": seed, "config": config})
    return Result(record=record, history=({"step": 1, "loss": 0.5},))


def test_ways_to_run_one_protocol_have_rows_of_their_own() -> None:
    angles = [made("namex-full", seed, options={"angle": a}) for seed, a in ((0, 0.5), (1, 0.0), (2, 0.5))]
    found = entries_of([*angles, made("dense", 0)])
    assert [(e.row, e.seed) for e in found] == [
        ("dense", 0),
        ("namex-full, angle 0", 1),
        ("namex-full, angle 0.5", 0),
        ("namex-full, angle 0.5", 2),
    ]
    assert found[1].keys == {"merging.protocol": "namex-full", "merging.options.angle": 0.0}
    assert {e.task for e in found} == {"glue/sst2"}


def test_a_kind_is_named_with_what_it_is_a_kind_of() -> None:
    keys = {"merging.protocol": "ties-ca", "merging.curvature.kind": "diagonal", "merging.curvature.rank": 2}
    assert row_label(keys) == "ties-ca, curvature kind diagonal, rank 2"


def test_kept_results_come_back(tmp_path: Path) -> None:
    result = made("dense", 3)
    keep_result(result, tmp_path, "dense-seed3")
    assert read_results(tmp_path) == [result]


def test_kept_cells_are_named_by_task_row_and_seed(tmp_path: Path) -> None:
    cells = entries_of([made("namex-full", s, options={"angle": a}) for s, a in ((0, 0.5), (1, 0.0))])
    assert keep_entries([*cells, replace(cells[0], result=None)], tmp_path) == 2
    names = sorted(path.name for path in tmp_path.glob("*.json"))
    assert names == ["sst2-namex-full-angle-0-seed1.json", "sst2-namex-full-angle-0.5-seed0.json"]
    assert len(read_results(tmp_path)) == 2


def test_an_output_folder_gives_its_finished_runs(tmp_path: Path) -> None:
    result, done = made("dense", 3), RunFolder.create(tmp_path, "done")
    RunFolder.create(tmp_path, "interrupted").append_history({"step": 1})
    done.write_record(result.record)
    done.append_history(dict(result.history[0]))
    assert read_results(tmp_path) == [result]


def test_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no records here\. Expected"):
        read_results(tmp_path)
