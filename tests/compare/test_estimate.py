"""What the missing cells would cost: by hand, from another seed, or why it is not known."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from camex_ft.backbones.source import OutOfReach
from camex_ft.compare import estimate as estimating
from camex_ft.compare.estimate import ADAM, CHECKPOINTS, estimate, print_estimate, rows_of, summary
from camex_ft.estimate import plan
from camex_ft.estimate.columns import known_rows
from camex_ft.results.run_folder import RunFolder
from camex_ft.utils.registry import TASKS

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
        assert each.saved == 4 * total
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
    assert re.match(r"4 cells, 4 of them missing: \S+ seconds of one device, \S+ GB of models", lines[0])


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
    assert not any(line.startswith("?") for line in summary(list(found.values())))


def test_what_is_not_known_says_why(compared):
    made = compared(TEXT, overrides=["backbone=./nowhere"])
    found = estimate([made])
    assert all(e.seconds is None and e.saved is None and "nowhere" in e.reason for e in found)
    assert sum(line.startswith("?: ") for line in summary(found)) == 1  # said once
    disk = compared(TEXT, overrides=["data.dir=mine"])
    assert rows_of(disk.cells[0].settled) == (60, 30)
    whole = compared(TEXT.replace("data.train_rows: 60, ", ""), overrides=["data.dir=mine"])
    assert "number of rows" in estimate([whole])[0].reason


def test_it_is_printed_with_a_line_for_each_cell(compared, keep):
    rows = "rows: [{merging.protocol: dense}, {name: '[b] κ', merging.protocol: ties}]"
    made = compared(f"config: glue\nset: {{backbone: embedded/bert}}\ntasks: [rte]\n{rows}\nseeds: 2")
    keep(made.cells[0], 3600.0)
    console = Console(file=io.StringIO(), width=40)
    print_estimate([made], console=console, cells=True, tflops=10.0)
    lines = [line for line in console.file.getvalue().splitlines() if line]
    assert lines[0].split()[:4] == ["task", "row", "seed", "state"]
    assert lines[1].split()[:6] == ["glue/rte", "dense", "0", "done", "1.0", "hours"]
    assert lines[2].split()[:6] == ["glue/rte", "dense", "1", "missing", "1.0", "hours"]
    assert lines[3].split()[:5] == ["glue/rte", "[b]", "κ", "0", "missing"] and " * " in lines[3]
    assert lines[5].startswith("4 cells, 3 of them missing: 1.0 hours of one device")
    assert any(line.startswith("*: counted") for line in lines[6:])


def test_data_of_the_hub_have_known_sizes(compared):
    hub = compared(
        TEXT.replace("data.train_rows: 60, data.eval_rows: 30, ", ""), overrides=["data.source=hub"]
    )
    assert rows_of(hub.cells[0].settled) == (2490, 277)


def test_a_table_is_a_line(compared, keep):
    made = compared(TEXT)
    keep(made.cells[0], 3600.0)
    console = Console(file=io.StringIO(), width=40)
    print_estimate([made], console=console, tflops=1.0)
    lines = [line for line in console.file.getvalue().splitlines() if line]
    assert lines[0].split() == ["table", "cells", "missing", "time", "kept", "while", "it", "runs"]
    assert lines[1].split()[:5] == ["spec", "4", "3", "1.0", "hours"]
    assert lines[2].startswith("4 cells, 3 of them missing: 1.0 hours") and "1 TFLOP/s, as given" in lines[3]


PAPER = """
config: glue
set: {profile: paper}
tasks: [rte]
rows: [{merging.protocol: [dense, ties-ca]}]
seeds: 1
"""


@pytest.fixture
def cut_off(monkeypatch):
    """No hub, and an empty cache."""

    def refuse(spec, files):
        raise OutOfReach(f"{spec} is out of reach")

    monkeypatch.setattr("camex_ft.backbones.source._from_hub", refuse)


def test_a_machine_without_network_knows_the_papers_cells(compared, cut_off):
    made = compared(PAPER)
    dense, merged = estimate([made])
    assert (made.profile, dense.reason) == ("paper", "") and merged.seconds > dense.seconds
    # T5-base without a head has 222,903,552 parameters, each once; the head adds two layers
    assert dense.working == CHECKPOINTS * 4 * ADAM * (222_903_552 + 768 * 769 + 769 * 2 - 2 + 2)
    lines = summary(estimate([made]), *estimating.rate([made]))
    assert lines[0].startswith("2 cells, 2 of them missing") and "?" not in lines[0]
    assert "10 TFLOP/s, which is an assumption for a GPU" in lines[1]
    [note] = [n for n in plan(made.cells[0].settled, protocols=["dense"], tflops=1.0).notes if "reach" in n]
    assert note == "google-t5/t5-base is out of reach: its shape is the one that comes with the package"


def test_a_backbone_that_nobody_knows_is_told_with_its_cells(compared, cut_off):
    made = compared(PAPER, overrides=["backbone=somebody/else"])
    lines = summary(estimate([made]))
    assert lines[0].startswith("2 cells, 2 of them missing: ? of one device, ? of models")
    assert lines[1:] == ["?: somebody/else is out of reach (2 cells)"]


def test_rows_of_diagnostic_sets_and_of_candidates(compared):
    def rows(suite, name):
        spec = (
            f"config: {suite}\nset: {{profile: paper}}\ntasks: [{name}]\nrows: [{{merging.protocol: dense}}]"
        )
        return rows_of(compared(spec).cells[0].settled)

    assert rows("glue", "ax") == (392_702, 9_815 + 9_832)
    assert rows("superglue", "copa") == (800, 200)  # a row for each choice
    assert rows("superglue", "record") is None  # as many rows as entities, which only the data tell


def test_the_rate_of_a_cpu_is_measured(compared, monkeypatch):
    monkeypatch.setattr(estimating, "measured_tflops", lambda: 0.125)
    monkeypatch.setattr(estimating, "gpu_here", lambda: False)
    assert estimating.rate([compared(TEXT)]) == (0.125, "measured here")
    assert estimating.rate([compared(TEXT)], 3.0) == (3.0, "as given")
    monkeypatch.setattr(estimating, "gpu_here", lambda: True)
    assert estimating.rate([compared(TEXT)])[0] == 10.0


def test_public_data_have_sizes_for_every_task_of_the_hub():
    for name in TASKS.names():
        task = TASKS.get(name)
        if task.hub:
            known = known_rows(task.train_from or name) or name == "superglue/record"
            assert known, name
