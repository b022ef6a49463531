"""Which record belongs to a cell: by the hash of its configuration on the record's data; of several the newest."""

from __future__ import annotations

import pytest

from camex_ft.compare.outcome import belongs, entries
from camex_ft.results.entries import Result


@pytest.fixture
def cells(compared):
    rows = "rows: [{merging.protocol: dense}, {merging.protocol: ties, merging.alpha: [0.5, 1.0]}]"
    return compared(f"config: glue\ntasks: [rte, cola]\n{rows}\nseeds: 2").cells


def test_every_cell_finds_its_own_run_and_no_other(cells, run_of):
    runs = [run_of(cell) for cell in cells]
    found = entries(cells, reversed(runs))
    assert [(e.task, e.row, e.seed, e.keys) for e in found] == [
        (c.task, c.row, c.seed, c.keys) for c in cells
    ]
    assert [e.result for e in found] == runs
    for n, run in enumerate(runs):
        assert [belongs(run, cell) for cell in cells] == [m == n for m in range(len(cells))]


def test_a_cell_without_a_run_is_empty(cells, run_of):
    found = entries(cells, [run_of(cells[1]), run_of(cells[4])])
    assert [n for n, e in enumerate(found) if e.result] == [1, 4]


def test_of_several_the_newest_whatever_their_order_and_data(cells, run_of):
    """As where the data have changed since: both belong to the cell."""
    old = run_of(cells[0], sha="aa", started="2026-01-01T00:00:00+00:00")
    new = run_of(cells[0], sha="bb", started="2026-01-02T00:00:00+00:00")
    for runs in ([old, new], [new, old]):
        assert entries(cells[:1], runs)[0].result is new


def test_a_run_of_another_seed_or_configuration_is_not_taken(cells, run_of):
    dense0, dense1, half = cells[0], cells[1], cells[2]
    assert (dense0.seed, dense1.seed, half.row) == (0, 1, "ties, alpha 0.5")
    assert entries([dense0], [run_of(dense1)])[0].result is None
    whole = next(c for c in cells if c.row == "ties, alpha 1")
    assert entries([half], [run_of(whole)])[0].result is None


def test_a_run_whose_name_was_made_on_other_data_is_not_taken(cells, run_of):
    """The hash holds the data's fingerprint: a record that says other data than its name is nobody's."""
    run = run_of(cells[0], sha="aa")
    other = run.record.model_copy(update={"data": run.record.data.model_copy(update={"sha256": "bb"})})
    assert not belongs(Result(record=other), cells[0])
