"""What the cells of comparisons would cost: hours of one device, and disk; nothing is run and no data are read.

A cell of whose row and task another seed has been run takes that one's time. Any other one is counted:

    seconds = 6 * multiply-adds a token * tokens of a row * (rows * epochs + rows of validation * epochs / 3) / TFLOP/s

two operations a multiply-add, and a backward pass of twice a forward one. Every row counts with its full length, so
that short texts take less; generating answers takes more. The sustained TFLOP/s is an assumption (`--tflops`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from rich.console import Console
from rich.table import Table
from rich.text import Text

from camex_ft.comparison.cells import Cell, Comparison
from camex_ft.comparison.finished import entries
from camex_ft.config import Config
from camex_ft.embedded import CORPORA
from camex_ft.errors import UserError
from camex_ft.escaping import say
from camex_ft.planning import Column, plan
from camex_ft.planning.duration import TFLOPS
from camex_ft.results.entries import Entry, Result, read_results

# rows of training and validation that the hub's data sets have; of language models, GPT-2's tokens
ROWS = {
    "glue/cola": (8_551, 1_043),
    "glue/mnli": (392_702, 19_647),
    "glue/mrpc": (3_668, 408),
    "glue/qnli": (104_743, 5_463),
    "glue/qqp": (363_846, 40_430),
    "glue/rte": (2_490, 277),
    "glue/sst2": (67_349, 872),
    "glue/stsb": (5_749, 1_500),
    "glue/wnli": (635, 71),
    "qa/squad": (87_599, 10_570),
    "qa/squad_v2": (130_319, 11_873),
    "qa/wikiqa": (20_360, 2_733),
}
TOKENS = {"lm/wikitext-2": (2_391_884, 247_289), "lm/wikitext-103": (117_920_140, 247_289)}
CHECKPOINTS = 2  # the best and the last, while a cell runs
ADAM = 3  # weights and two moments
WIDTH = 160  # of a table that goes to a file


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a cell would cost.

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


def estimate(comparisons: Sequence[Comparison], *, tflops: float = TFLOPS) -> list[Estimate]:
    """Return what each cell would cost, those that comparisons share once.

    Args:
        comparisons: with their cells.
        tflops: what a device sustains, in 10^12 operations a second.
    """
    cells = list({cell.command: cell for c in comparisons for cell in c.cells}.values())
    found = entries(cells, _results(comparisons))
    planned: dict[str, Column | UserError] = {}
    made = []
    for cell, entry in zip(cells, found, strict=True):
        key = json.dumps([cell.task, _model(cell.settled), cell.settled.task.model_dump(mode="json")])
        if key not in planned:
            planned[key] = _column(cell.settled)
        made.append(_estimate(cell, entry, found, planned[key], tflops))
    return made


def print_estimate(
    comparisons: Sequence[Comparison], *, tflops: float = TFLOPS, console: Console | None = None
) -> None:
    """Print every cell with its state and cost, and the sums over what is missing."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH)
    made = estimate(comparisons, tflops=tflops)
    table = Table(box=None, pad_edge=False)
    for name in ("task", "row", "seed", "state", "hours", "kept", "while it runs"):
        table.add_column(name, justify="left" if name in ("task", "row", "state") else "right", no_wrap=True)
    for each in made:
        hours = "?" if each.seconds is None else f"{each.seconds / 3600:.2f}{'' if each.measured else ' *'}"
        state = "done" if each.done else "missing"
        sizes = (_gigabytes(each.kept), _gigabytes(each.working))
        table.add_row(each.cell.task, Text(each.cell.row), str(each.cell.seed), state, hours, *sizes)
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    for line in summary(made, tflops):
        say(console, line)


def summary(made: Sequence[Estimate], tflops: float = TFLOPS) -> list[str]:
    """Return the sums over the cells that are missing, and what the figures are."""
    missing = [each for each in made if not each.done]
    seconds = [each.seconds for each in missing if each.seconds is not None]
    kept = sum(each.kept or 0 for each in missing)
    working = max((each.working or 0 for each in missing), default=0)
    lines = [
        f"{len(made)} cells, {len(missing)} of them missing: {sum(seconds) / 3600:.1f} hours of one device, "
        f"{kept / 1e9:.1f} GB of models, and up to {working / 1e9:.1f} GB of checkpoints for each cell that runs",
    ]
    if any(not each.measured for each in missing if each.seconds is not None):
        lines.append(
            f"*: counted, every row at its full length, at {tflops:g} TFLOP/s, which is an assumption; "
            "without it: as another seed took"
        )
    reasons = dict.fromkeys(each.reason for each in missing if each.reason)
    return [*lines, *(f"?: {reason}" for reason in reasons)]


def rows_of(settled: Config) -> tuple[int, int] | None:
    """Return the rows of training and validation, blocks for a language model; None where they are not known."""
    task, data = settled.task.id, settled.data
    if data.source == "embedded":
        sizes = CORPORA.get(task).sizes
        found = (sizes["train"], sum(size for name, size in sizes.items() if name.startswith("validation")))
    elif data.source == "hub" and task in TOKENS:
        train, validation = TOKENS[task]
        return train // settled.task.block_size, validation // settled.task.step
    elif data.source == "hub" and task in ROWS:
        found = ROWS[task]
    elif data.train_rows is not None and data.eval_rows is not None:
        found = (data.train_rows, data.eval_rows)
    else:
        return None
    return (min(found[0], data.train_rows or found[0]), min(found[1], data.eval_rows or found[1]))


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
        length = (
            cell.settled.task.block_size if cell.settled.task.suite == "lm" else cell.settled.task.max_length
        )
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
    parts = (settled.merging, settled.routing, settled.upcycle, settled.tuning)
    return [settled.backbone, *(part.model_dump(mode="json") for part in parts)]


def _results(comparisons: Sequence[Comparison]) -> list[Result]:
    made: dict[str, list[Result]] = {}
    for comparison in comparisons:
        try:
            made[str(comparison.output)] = read_results(comparison.output)
        except UserError:
            continue
    return [result for some in made.values() for result in some]


def _gigabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e9:.2f} GB"
