"""Estimated cost of the cells of comparisons: hours of one device, and disk; nothing is run and no data are read.

A cell of whose row and task another seed has been run takes that one's time. Any other one is counted:

    seconds = 6 * multiply-adds a token * tokens of a row * (rows * epochs + rows of validation * epochs / 3) / TFLOP/s

two operations a multiply-add, and a backward pass of twice a forward one. Every row counts with its full length, so
that short texts take less; generating answers takes more. The sustained TFLOP/s is that of `--tflops`, else an
assumption for a GPU (`planning.duration.TFLOPS`), which the profile `paper` is for, and measured here for a CPU. Sizes
of public data sets and shapes of backbones that are out of reach are those of `planning.facts`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from rich.console import Console
from rich.table import Table
from rich.text import Text

from camex_ft.compare.cells import Cell, Comparison
from camex_ft.compare.finished import entries
from camex_ft.config import Config
from camex_ft.estimate import Column, facts, plan
from camex_ft.estimate.memory import gpu_here
from camex_ft.estimate.operations import TFLOPS, measured_tflops
from camex_ft.results.entries import Entry, Result, read_results
from camex_ft.synthetic import CORPORA
from camex_ft.tasks.base import Task
from camex_ft.tasks.lm import LanguageModellingConfig
from camex_ft.utils.errors import UserError
from camex_ft.utils.escaping import one_line, say
from camex_ft.utils.registry import TASKS

CHECKPOINTS = 2  # the best and the last, while a cell runs
ADAM = 3  # weights and two moments
WIDTH = 160  # of a table that goes to a file
COUNTED = " *"  # after a time


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated cost of a cell.

    Attributes:
        cell: which.
        done: it has a record.
        seconds: of one device; None where that is not known, for `reason`.
        measured: the seconds are another seed's.
        kept, working: bytes of the model that stays, and of checkpoints while it runs.
        reason: why something is not known.
    """

    cell: Cell
    done: bool
    seconds: float | None = None
    measured: bool = False
    kept: int | None = None
    working: int | None = None
    reason: str = ""


def estimate(comparisons: Sequence[Comparison], *, tflops: float | None = None) -> list[Estimate]:
    """Return what each cell would cost, those that comparisons share once.

    Args:
        comparisons: with their cells.
        tflops: what a device sustains, in 10^12 operations a second; None: see `rate`.
    """
    speed = rate(comparisons, tflops)[0]
    cells = list({cell.command: cell for c in comparisons for cell in c.cells}.values())
    found = entries(cells, _results(comparisons))
    planned: dict[str, Column | UserError] = {}
    made = []
    for cell, entry in zip(cells, found, strict=True):
        task: Task = TASKS.get(cell.task)
        reads = cell.settled.task.model_dump(mode="json", exclude={"suite", "name"})
        # tasks that read and decide alike cost alike for each token
        alike = [task.head, task.regression, len(task.kind_names), cell.settled.data.source, reads]
        key = json.dumps([*alike, _model(cell.settled)])
        if key not in planned:
            planned[key] = _column(cell.settled)
        made.append(_estimate(cell, entry, found, planned[key], speed))
    return made


def rate(comparisons: Sequence[Comparison], tflops: float | None = None) -> tuple[float, str]:
    """Return the sustained rate that estimates take, in 10^12 operations a second, and where it comes from.

    Args:
        comparisons: with their cells.
        tflops: as asked for.
    """
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
    """Print a line for each comparison, or for each cell, and the sums over what is missing."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH)
    made = estimate(comparisons, tflops=tflops)
    table = _cells(made) if cells else _comparisons(comparisons, made)
    console.print(table, highlight=False, soft_wrap=True)
    for line in summary(made, *rate(comparisons, tflops)):
        say(console, line)


def _comparisons(comparisons: Sequence[Comparison], made: Sequence[Estimate]) -> Table:
    """Return a line for each comparison; a cell that two of them have counts in both."""
    table = _table(("table",), ("cells", "missing", "time", "kept", "while it runs"))
    by_command = {each.cell.command: each for each in made}
    for comparison in comparisons:
        own = [by_command[command] for command in dict.fromkeys(cell.command for cell in comparison.cells)]
        missing = [each for each in own if not each.done]
        sizes = (_sum(each.kept for each in missing), _most(each.working for each in missing))
        counts = (str(len(own)), str(len(missing)))
        table.add_row(Text(one_line(comparison.name)), *counts, _time(missing), *map(_gigabytes, sizes))
    return table


def _cells(made: Sequence[Estimate]) -> Table:
    table = _table(("task", "row", "seed", "state"), ("time", "kept", "while it runs"))
    for each in made:
        state = "done" if each.done else "missing"
        sizes = (_gigabytes(each.kept), _gigabytes(each.working))
        names = (each.cell.task, each.cell.row, str(each.cell.seed), state)
        table.add_row(*(Text(one_line(name)) for name in names), _time([each]), *sizes)
    return table


def _table(words: Iterable[str], numbers: Iterable[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in words:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def summary(made: Sequence[Estimate], tflops: float = TFLOPS, source: str = "") -> list[str]:
    """Return the sums over the cells that are missing, and what the figures are.

    Args:
        made: of `estimate`.
        tflops, source: of `rate`.
    """
    missing = [each for each in made if not each.done]
    sizes = (_sum(each.kept for each in missing), _most(each.working for each in missing))
    kept, working = map(_gigabytes, sizes)
    lines = [f"{len(made)} cells, {len(missing)} of them missing"]
    if missing:
        lines[0] += (
            f": {_time(missing).removesuffix(COUNTED)} of one device, {kept} of models, and up to {working} of "
            "checkpoints for each cell that runs"
        )
    if any(not each.measured and each.seconds is not None for each in missing):
        lines.append(
            f"*: counted, every row at its full length, at {tflops:.3g} TFLOP/s{', ' * bool(source)}{source}; "
            "without it: as another seed took"
        )
    unknown: dict[str, int] = {}
    for each in missing:
        if each.reason:
            unknown[each.reason] = unknown.get(each.reason, 0) + 1
    return [*lines, *(f"?: {reason} ({count} cells)" for reason, count in unknown.items())]


def rows_of(settled: Config) -> tuple[int, int] | None:
    """Return the rows of training and validation, blocks for a language model; None where they are not known."""
    task, data, settings = settled.task.id, settled.data, settled.task
    counted = facts.tokens(task) if data.source == "hub" else None
    if data.source == "embedded":
        found = _two(CORPORA.get(task).sizes)
    elif counted is not None and isinstance(settings, LanguageModellingConfig):
        found = (counted["train"] // settings.block_size, counted["validation"] // settings.step)
    elif data.source == "hub" and (sizes := _public(task)) is not None:
        found = sizes
    elif data.train_rows is not None and data.eval_rows is not None:
        found = (data.train_rows, data.eval_rows)
    else:
        return None
    return (min(found[0], data.train_rows or found[0]), min(found[1], data.eval_rows or found[1]))


def _public(name: str) -> tuple[int, int] | None:
    """Return the rows of training and validation of a public data set; a diagnostic set has those of another task."""
    task: Task = TASKS.get(name)
    sizes = facts.rows(task.train_from or name)
    return None if sizes is None else _two(sizes)


def _two(sizes: Mapping[str, int]) -> tuple[int, int]:
    return sizes["train"], sum(size for name, size in sizes.items() if name.startswith("validation"))


def _estimate(
    cell: Cell, entry: Entry, found: Iterable[Entry], column: Column | UserError, tflops: float
) -> Estimate:
    same = [e.result.record.run for e in found if (e.task, e.row) == (entry.task, entry.row) and e.result]
    measured = [run.seconds for run in same if run.seconds is not None and run.resumed is None]
    if isinstance(column, UserError):
        seconds = mean(measured) if measured else None
        reason = " ".join(str(column).split())
        return Estimate(
            cell=cell, done=entry.result is not None, seconds=seconds, measured=True, reason=reason
        )
    sizes = rows_of(cell.settled)
    counted, reason = None, ""
    if sizes is None:
        reason = f"{cell.task}: how many rows its data have is not known before they are read"
    else:
        training = cell.settled.training
        length = cell.settled.task.length
        rows = training.num_train_epochs * (sizes[0] + sizes[1] / 3)
        if training.max_steps > 0:
            rows = training.max_steps * (training.global_batch_size or training.per_device_train_batch_size)
        counted = 6 * column.operations.total * length * rows / (tflops * 1e12)
    parameters = column.parameters
    return Estimate(
        cell=cell,
        done=entry.result is not None,
        seconds=mean(measured) if measured else counted,
        measured=bool(measured),
        kept=4 * parameters.total if cell.settled.output.model else 0,
        working=CHECKPOINTS * 4 * (parameters.total + (ADAM - 1) * parameters.trainable),
        reason=reason,
    )


def _column(settled: Config) -> Column | UserError:
    try:
        return plan(settled, protocols=[settled.merging.protocol], tflops=TFLOPS).columns[0]
    except UserError as error:
        return error


def _model(settled: Config) -> list[object]:
    merging = settled.merging.model_dump(mode="json", exclude={"alpha"})  # a factor, which costs nothing
    parts = (settled.routing, settled.upcycle, settled.tuning)
    return [settled.backbone, merging, *(part.model_dump(mode="json") for part in parts)]


def _results(comparisons: Sequence[Comparison]) -> list[Result]:
    made: dict[str, list[Result]] = {}
    for comparison in comparisons:
        try:
            made[str(comparison.output)] = read_results(comparison.output)
        except UserError:
            continue
    return [result for some in made.values() for result in some]


def _sum(sizes: Iterable[int | None]) -> int | None:
    """Return the sum of what is known; None where nothing is."""
    known = [size for size in sizes if size is not None]
    return sum(known) if known else None


def _most(sizes: Iterable[int | None]) -> int | None:
    return max((size for size in sizes if size is not None), default=None)


def _time(cells: Sequence[Estimate]) -> str:
    """Return the time of cells, with a sign where it is counted; "?" where none is known, "more than" where some is."""
    known = [each for each in cells if each.seconds is not None]
    if not known:
        return "?" if cells else ""
    total = sum(each.seconds or 0.0 for each in known)
    if total >= 3600:
        text = f"{total / 3600:,.1f} hours"
    else:
        text = f"{total / 60:.1f} minutes" if total >= 60 else f"{total:.2g} seconds"
    more = "more than " if len(known) < len(cells) else ""
    return f"{more}{text}{'' if all(each.measured for each in known) else COUNTED}"


def _gigabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e9:.2f} GB"
