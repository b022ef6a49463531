"""What the missing cells would cost: by hand, from another seed, or why it is not known."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from camex_ft.comparison.estimate import ADAM, CHECKPOINTS, estimate, print_estimate, rows_of, summary
from camex_ft.planning import plan
from camex_ft.results.folder import RunFolder

TEXT = """
config: glue
set: {backbone: embedded/bert, data.train_rows: 60, data.eval_rows: 30, training.num_train_epochs: 3}
tasks: [rte]
rows: [{merging.protocol: [dense, ties-ca]}]
seeds: 2
"""


@pytest.fixture
def keep(run_of):
    """Put a finished run of a cell into its output folder."""

    def keep(cell, seconds):
        record = run_of(cell, seconds=seconds).record
        RunFolder.create(cell.settled.output.path, record.run.name).write_record(record)

    return keep


def test_seconds_and_bytes_by_hand(compared):
    made = compared(TEXT)
    for each in estimate([made], tflops=2.0):
        [column] = plan(each.cell.settled, protocols=[each.cell.settled.merging.protocol]).columns
        rows = 3 * 60 + 3 * 30 / 3  # a forward pass costs a third of a step
        tokens = rows * each.cell.settled.task.max_length
        assert each.seconds == pytest.approx(6 * column.operations.total * tokens / 2e12)
        total, trained = column.parameters.total, column.parameters.trainable
        assert each.kept == 4 * total
        assert each.working == CHECKPOINTS * (4 * total + 4 * (ADAM - 1) * trained)
        assert not each.done and not each.measured and not each.reason


def test_steps_count_instead_of_epochs(compared):
    made = compared(TEXT, overrides=["training.max_steps=7"])
    epochs = {e.cell.command: e.seconds for e in estimate([compared(TEXT)])}
    for each, whole in zip(estimate([made]), epochs.values(), strict=True):
        assert each.seconds == pytest.approx(whole * 7 * 32 / 210)


def test_cells_that_comparisons_share_count_once(compared):
    made = compared(TEXT)
    assert len(estimate([made, made])) == len(made.cells) == 4
    lines = summary(estimate([made, made]))
    assert lines[0].startswith("4 cells, 4 of them missing: 0.0 hours of one device, 0.0 GB of models")


def test_another_seed_of_the_row_and_task_is_believed_first(compared, keep):
    made = compared(TEXT)
    dense = [c for c in made.cells if c.row == "dense"]
    keep(dense[0], 7200.0)
    found = {(e.cell.row, e.cell.seed): e for e in estimate([made])}
    assert (found["dense", 0].done, found["dense", 1].done) == (True, False)
    assert found["dense", 1].seconds == 7200.0 and found["dense", 1].measured
    assert not found["ties-ca", 0].measured
    counted = found["ties-ca", 0].seconds
    total = (7200 + 2 * counted) / 3600
    assert summary(list(found.values()))[0].startswith(f"4 cells, 3 of them missing: {total:.1f} hours")


def test_what_is_not_known_says_why(compared):
    made = compared(TEXT, overrides=["backbone=./nowhere"])
    found = estimate([made])
    assert all(e.seconds is None and e.kept is None and "nowhere" in e.reason for e in found)
    assert sum(line.startswith("?: ") for line in summary(found)) == 1  # said once
    disk = compared(TEXT, overrides=["data.dir=mine"])
    assert rows_of(disk.cells[0].settled) == (60, 30)
    whole = compared(TEXT.replace("data.train_rows: 60, ", ""), overrides=["data.dir=mine"])
    assert "how many rows" in estimate([whole])[0].reason


def test_it_is_printed_with_a_line_for_each_cell(compared, keep):
    rows = "rows: [{merging.protocol: dense}, {name: '[b] κ', merging.protocol: ties}]"
    made = compared(f"config: glue\nset: {{backbone: embedded/bert}}\ntasks: [rte]\n{rows}\nseeds: 2")
    keep(made.cells[0], 3600.0)
    console = Console(file=io.StringIO(), width=40)
    print_estimate([made], console=console)
    lines = console.file.getvalue().splitlines()
    assert lines[0].split()[:4] == ["task", "row", "seed", "state"]
    assert lines[1].split()[:5] == ["glue/rte", "dense", "0", "done", "1.00"]
    assert lines[2].split()[:5] == ["glue/rte", "dense", "1", "missing", "1.00"]
    assert lines[3].split()[:6] == ["glue/rte", "[b]", "κ", "0", "missing", "0.00"]
    assert lines[5].startswith("4 cells, 3 of them missing: 1.0 hours of one device")
    assert any(line.startswith("*: counted") for line in lines[6:])


def test_data_of_the_hub_have_known_sizes(compared):
    hub = compared(
        TEXT.replace("data.train_rows: 60, data.eval_rows: 30, ", ""), overrides=["data.source=hub"]
    )
    assert rows_of(hub.cells[0].settled) == (2490, 277)
