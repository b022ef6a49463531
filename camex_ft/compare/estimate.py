"""Estimated cost of the cells of comparisons: hours of one device, and disk; nothing is run and no data are read.

A cell takes the time of another seed of its row and task, if one has been run. Otherwise its time is counted:

    seconds = 6 * multiply-adds a token * tokens of a row * (rows * epochs + rows of validation * epochs / 3) / TFLOP/s

two operations a multiply-add, and a backward pass of twice a forward one. Every row counts with its full length, so
that short texts take less; generating answers takes more. The sustained TFLOP/s is that of `--tflops`, else an
assumption for a GPU (`estimate.operations.TFLOPS`) under the profile `paper`, and measured here for a CPU. Sizes of
public data sets, and shapes of backbones that are out of reach, are those of `estimate/facts.yaml`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import mean

from rich.console import Console

from camex_ft.compare.cells import Cell, Comparison
from camex_ft.compare.outcome import entries
from camex_ft.config import Config
from camex_ft.estimate import Column, plan
from camex_ft.estimate.columns import known_rows, known_tokens
from camex_ft.estimate.memory import gpu_here
from camex_ft.estimate.operations import TFLOPS, measured_tflops
from camex_ft.results.entries import Entry, Result, read_results
from camex_ft.synthetic import CORPORA
from camex_ft.tasks.base import Task
from camex_ft.tasks.lm import LanguageModellingConfig
from camex_ft.utils.errors import UserError
from camex_ft.utils.escaping import Rows, print_rows, say
from camex_ft.utils.registry import TASKS

CHECKPOINTS = 2  # the best and the last, while a cell runs
ADAM = 3  # weights and two moments
COUNTED = " *"  # after a time
SIZES = ("time", "kept", "while it runs")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated cost of a cell."""

    cell: Cell
    done: bool  # it has a record
    seconds: float | None = None  # of one device
    measured: bool = False  # the seconds are another seed's
    saved: int | None = None  # bytes of the model
    working: int | None = None  # bytes of checkpoints while it runs
    reason: str = ""  # of anything that is not known


def estimate(comparisons: Sequence[Comparison], *, tflops: float | None = None) -> list[Estimate]:
    """Return the cost of each cell; cells that comparisons share occur once. For `tflops` see `rate`."""
    speed = rate(comparisons, tflops)[0]
    cells = list({cell.command: cell for c in comparisons for cell in c.cells}.values())
    results: list[Result] = []
    for output in dict.fromkeys(comparison.output for comparison in comparisons):
        with suppress(UserError):  # no record yet
            results += read_results(output)
    cell_entries = entries(cells, results)
    seconds: dict[tuple[str, str], list[float]] = {}  # of whole runs, by task and row
    for entry in cell_entries:
        run = entry.result.record.run if entry.result else None
        if run is not None and run.seconds is not None and run.resumed is None:
            seconds.setdefault((entry.task, entry.row), []).append(run.seconds)
    columns: dict[str, Column | UserError] = {}
    estimates = []
    for cell, entry in zip(cells, cell_entries, strict=True):
        key = _costs_alike(cell.settled)
        if key not in columns:
            try:
                protocols = [cell.settled.merging.protocol]
                columns[key] = plan(cell.settled, protocols=protocols, tflops=TFLOPS).columns[0]
            except UserError as error:
                columns[key] = error
        measured = seconds.get((entry.task, entry.row), [])
        estimates.append(_estimate(cell, entry, measured, columns[key], speed))
    return estimates


def rate(comparisons: Sequence[Comparison], tflops: float | None = None) -> tuple[float, str]:
    """Return the sustained rate of estimates, in 10^12 operations a second, and its source in words."""
    if tflops is not None:
        return tflops, "as given"
    if gpu_here() or any(comparison.profile != "embedded" for comparison in comparisons):
        return TFLOPS, "which is an assumption for a GPU"
    return measured_tflops(), "measured here"


def print_estimate(
    comparisons: Sequence[Comparison],
    *,
    tflops: float | None = None,
    cells: bool = False,
    console: Console | None = None,
) -> None:
    """Print a line for each comparison, or for each cell, and the sums over missing cells.

    A cell of two comparisons counts in both.
    """
    console = console or Console()
    estimates = estimate(comparisons, tflops=tflops)
    if cells:
        headings: tuple[str, ...] = ("task", "row", "seed", "state", *SIZES)
        rows: Rows = []
        for cost in estimates:
            state = "done" if cost.done else "missing"
            rows.append(
                (cost.cell.task, cost.cell.row, str(cost.cell.seed), state, _time([cost]), *_disk([cost]))
            )
    else:
        headings, rows = ("table", "cells", "missing", *SIZES), []
        by_command = {cost.cell.command: cost for cost in estimates}
        for comparison in comparisons:  # a cell of two comparisons counts in both
            own = [
                by_command[command] for command in dict.fromkeys(cell.command for cell in comparison.cells)
            ]
            missing = [cost for cost in own if not cost.done]
            counts = (str(len(own)), str(len(missing)))
            rows.append((comparison.name, *counts, _time(missing), *_disk(missing)))
    print_rows(headings, rows, console=console)
    for line in summary(estimates, *rate(comparisons, tflops)):
        say(console, line)


def summary(estimates: Sequence[Estimate], tflops: float = TFLOPS, source: str = "") -> list[str]:
    """Return the sums over missing cells, and explanations of the figures; `tflops` and `source` are of `rate`."""
    missing = [cost for cost in estimates if not cost.done]
    models, working = _disk(missing)
    lines = [f"{len(estimates)} cells, {len(missing)} of them missing"]
    if missing:
        lines[0] += (
            f": {_time(missing).removesuffix(COUNTED)} of one device, {models} of models, and up to {working} of "
            "checkpoints for each cell that runs"
        )
    if any(not cost.measured and cost.seconds is not None for cost in missing):
        lines.append(
            f"*: counted, every row at its full length, at {tflops:.3g} TFLOP/s{', ' * bool(source)}{source}; "
            "without it: the time of another seed"
        )
    unknown = Counter(cost.reason for cost in missing if cost.reason)
    return [*lines, *(f"?: {reason} ({count} cells)" for reason, count in unknown.items())]


def rows_of(settled: Config) -> tuple[int, int] | None:
    """Return the rows of training and validation, blocks for a language model; None where they are not known."""
    name, data, settings = settled.task.id, settled.data, settled.task
    task: Task = TASKS.get(name)
    rows: Mapping[str, int] | None = None
    tokens = known_tokens(name) if data.source == "hub" else None
    if data.source == "embedded":
        rows = CORPORA.get(name).sizes
    elif tokens is not None and isinstance(settings, LanguageModellingConfig):
        blocks = {"train": settings.block_size, "validation": settings.step}
        rows = {split: tokens[split] // size for split, size in blocks.items()}
    elif data.source == "hub":
        rows = known_rows(task.train_from or name)  # a diagnostic set is trained on another task
    if rows is None and data.train_rows is not None and data.eval_rows is not None:
        return data.train_rows, data.eval_rows
    if rows is None:
        return None
    validation = sum(size for split, size in rows.items() if split.startswith("validation"))
    return min(rows["train"], data.train_rows or rows["train"]), min(validation, data.eval_rows or validation)


def _estimate(
    cell: Cell, entry: Entry, measured: Sequence[float], column: Column | UserError, tflops: float
) -> Estimate:
    """Return the cost of a cell, whose row has taken the `measured` seconds with other seeds."""
    done = entry.result is not None
    if isinstance(column, UserError):
        seconds = mean(measured) if measured else None
        reason = " ".join(str(column).split())
        return Estimate(cell=cell, done=done, seconds=seconds, measured=True, reason=reason)
    task, training = cell.settled.task, cell.settled.training
    sizes = rows_of(cell.settled)
    counted, reason = None, ""
    if sizes is None:
        reason = f"{cell.task}: the number of rows is not known before the data are read"
    else:
        rows = training.num_train_epochs * (sizes[0] + sizes[1] / 3)
        if training.max_steps > 0:
            rows = training.max_steps * (training.global_batch_size or training.per_device_train_batch_size)
        counted = 6 * column.operations.total * task.length * rows / (tflops * 1e12)
    parameters = column.parameters
    return Estimate(
        cell=cell,
        done=done,
        seconds=mean(measured) if measured else counted,
        measured=bool(measured),
        saved=4 * parameters.total if cell.settled.output.model else 0,
        working=CHECKPOINTS * 4 * (parameters.total + (ADAM - 1) * parameters.trainable),
        reason=reason,
    )


def _costs_alike(settled: Config) -> str:
    """Return a key that is the same for configurations of the same cost a token."""
    task: Task = TASKS.get(settled.task.id)
    reads = settled.task.model_dump(mode="json", exclude={"suite", "name"})
    merging = settled.merging.model_dump(mode="json", exclude={"alpha"})  # a factor, which costs nothing
    sections = [part.model_dump(mode="json") for part in (settled.routing, settled.upcycle, settled.tuning)]
    of_task = [task.head, task.regression, len(task.kind_names), settled.data.source, reads]
    return json.dumps([*of_task, settled.backbone, merging, *sections])


def _disk(estimates: Iterable[Estimate]) -> tuple[str, str]:
    """Return the sum of kept bytes and the largest of working bytes, in words; "?" where none is known."""
    known = [cost for cost in estimates if cost.saved is not None and cost.working is not None]
    if not known:
        return "?", "?"
    models, working = sum(c.saved or 0 for c in known), max(c.working or 0 for c in known)
    return f"{models / 1e9:.2f} GB", f"{working / 1e9:.2f} GB"


def _time(cells: Sequence[Estimate]) -> str:
    """Return the time of cells, with a sign where it is counted; "?" where none is known, "more than" where some is."""
    known = [cost for cost in cells if cost.seconds is not None]
    if not known:
        return "?" if cells else ""
    total = sum(cost.seconds or 0.0 for cost in known)
    text = f"{total / 60:.1f} minutes" if total >= 60 else f"{total:.2g} seconds"
    if total >= 3600:
        text = f"{total / 3600:,.1f} hours"
    more = "more than " if len(known) < len(cells) else ""
    return f"{more}{text}{'' if all(cost.measured for cost in known) else COUNTED}"
