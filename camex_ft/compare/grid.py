"""Run the missing cells of comparisons, show their progress, and write the results.

`survey` finds the cells that are done, by this machine's data; `view` shows a table on a terminal and prints a line for
each change elsewhere; `run_grid` runs the rest, and `conclude` writes tables, pictures and report.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from camex_ft.backbones.donors import checkpoints_of, content_of
from camex_ft.compare.cells import Cell, Comparison
from camex_ft.compare.outcome import ComparisonOutcome, outcome, write_all
from camex_ft.compare.running import DONE, FAILED, RUNNING, WAITING, CellState, Runner, slots
from camex_ft.config import resolve
from camex_ft.config.backbones import EMBEDDED
from camex_ft.data import sources
from camex_ft.results import command_line, find_done
from camex_ft.results.entries import Result, read_results
from camex_ft.results.record import duration
from camex_ft.results.render import render
from camex_ft.run import steps
from camex_ft.utils.errors import UserError
from camex_ft.utils.escaping import one_line, say
from camex_ft.utils.registry import TASKS

STYLES = {DONE: "green", RUNNING: "cyan", WAITING: "dim", FAILED: "red"}
LONGEST = 100  # of a reason, in characters


@dataclass(frozen=True)
class View:
    """Receiver of the runner's events: `changed` of a cell, `tick` a few times a second."""

    changed: Callable[[CellState], None]
    tick: Callable[[], None]


def survey(
    cells: Sequence[Cell], *, force: bool = False, say: Callable[[str], None] = lambda line: None
) -> list[CellState]:
    """Return the state of every cell before anything runs: done, waiting, or failed because something is missing.

    Each data set and each backbone is read once; those of the hub that are not in its cache are downloaded. A cell of
    two comparisons occurs once. With `force` no cell counts as done.

    Raises:
        UserError: no cell can run.
    """
    steps.quieten()
    digests: dict[str, tuple[str, str | None] | UserError] = {}  # SHA-256 of data and backbone, or why not
    states: dict[str, CellState] = {}
    for cell in cells:
        settled = cell.settled
        donors = checkpoints_of(settled.upcycle)
        key = json.dumps([cell.task, settled.data.model_dump(mode="json"), settled.backbone, donors])
        if key not in digests:
            say(f"reading {cell.task}")
            try:
                resolve(cell.settled)
                data = sources.fingerprint(steps.load_splits(cell.settled, TASKS.get(cell.task)))
                digests[key] = data, content_of(settled.backbone, donors).sha256
            except UserError as error:
                digests[key] = error
        digest = digests[key]
        if isinstance(digest, UserError):
            reason = " ".join(str(digest).split())
            states[f"{cell}: {cell.command}"] = CellState(cell=cell, status=FAILED, reason=reason)
            continue
        name = steps.name_of(cell.settled, *digest)
        state = CellState(cell=cell, name=name)
        if not force and find_done(cell.settled.output.path / "runs" / name) is not None:
            state.status, state.before = DONE, True
        states.setdefault(name, state)
    if all(state.status == FAILED for state in states.values()):
        raise next(digest for digest in digests.values() if isinstance(digest, UserError))
    return list(states.values())


@contextmanager
def view(states: Sequence[CellState], slots: int, *, console: Console | None = None) -> Iterator[View]:
    """Show the `states` of all cells, which change, while the body runs; `slots` of them run at a time."""
    console = console or Console()
    if not console.is_terminal:

        def changed(state: CellState) -> None:
            say(console, line(state, states))

        yield View(changed, lambda: None)
        return
    with Live(console=console, auto_refresh=False) as live:

        def show() -> None:
            live.update(picture(states, slots), refresh=True)

        yield View(lambda state: show(), show)


def line(state: CellState, states: Sequence[CellState]) -> str:
    """Return a cell's state in a line: "[3/12] glue/sst2 ties-ca seed 0: done in 42.0 s"."""
    ended = sum(s.status in (DONE, FAILED) for s in states)
    log = f" (see {state.log})" if state.log else ""
    words = {DONE: f"done in {duration(state.seconds)}", FAILED: f"failed: {state.reason}{log}"}
    return f"[{ended}/{len(states)}] {state.cell}: {words.get(state.status, state.status)}"


def picture(states: Sequence[CellState], slots: int) -> RenderableType:
    """Return the table of cells, rows x tasks, with lines for running and failed cells."""
    tasks = list(dict.fromkeys(s.cell.task for s in states))
    rows = list(dict.fromkeys(s.cell.row for s in states))
    table = Table()
    table.add_column("", no_wrap=True)
    for task in tasks:
        table.add_column(Text(one_line(task)))
    for row in rows:
        some = [[s for s in states if s.cell.task == task and s.cell.row == row] for task in tasks]
        table.add_row(Text(one_line(row)), *(cell(each) for each in some))
    notes = {
        RUNNING: lambda s: (
            f"{s.cell}, "
            + ("starting" if s.left is None else f"{s.share:.0%}, about {duration(s.left)} left")
        ),
        FAILED: lambda s: f"{s.cell}: {s.reason[:LONGEST]}",
    }
    lines = [
        Text(one_line(f"{status}: {note(state)}"), STYLES[status])
        for status, note in notes.items()
        for state in states
        if state.status == status
    ]
    return Group(Text(headline(states, slots), "bold"), table, *lines)


def cell(states: Sequence[CellState]) -> Text:
    """Return the states of the seeds in one field of the table: "2 done, 1 waiting"."""
    counts = Counter(s.status for s in states)
    text = Text()
    for status in (DONE, RUNNING, FAILED, WAITING):
        if counts[status]:
            share = max((s.share for s in states if s.status == status), default=0.0)
            word = f"running {share:.0%}" if status == RUNNING and share else status
            text.append(", " if text else "").append(f"{counts[status]} {word}", STYLES[status])
    return text


def headline(states: Sequence[CellState], slots: int) -> str:
    """Return the number of cells in each state, and the time left."""
    counts = Counter(s.status for s in states)
    words = [f"{counts[status]} {status}" for status in (DONE, RUNNING, WAITING, FAILED) if counts[status]]
    left = time_left(states, slots)
    return ", ".join(words) + (f"; about {duration(left)} left" if left else "")


def time_left(states: Sequence[CellState], slots: int) -> float | None:
    """Return the seconds that are left, None before any cell has made progress.

    A waiting cell counts with the mean of its row, or of all cells that ran in this call.
    """
    ran: dict[tuple[str, str] | None, list[float]] = {}
    for state in states:
        took = state.seconds if state.status == DONE and not state.before else None
        if state.left is not None:
            took = time.monotonic() - state.started + state.left
        if took is not None:
            for key in (None, (state.cell.task, state.cell.row)):
                ran.setdefault(key, []).append(took)
    if not ran:
        return None
    mean = {key: sum(values) / len(values) for key, values in ran.items()}
    waiting = [mean.get((s.cell.task, s.cell.row), mean[None]) for s in states if s.status == WAITING]
    running = [mean[None] if s.left is None else s.left for s in states if s.status == RUNNING]
    return max((sum(waiting) + sum(running)) / slots, *running, *waiting, 0.0)


def run_grid(
    comparisons: Sequence[Comparison],
    *,
    jobs: int | None = None,
    force: bool = False,
    runner: Callable[..., Runner] = Runner,
) -> int:
    """Run missing cells, print the tables, write tables, pictures and report; return how many cells failed.

    The comparisons' runs share one output folder, and a cell that two of them have runs once.

    Raises:
        UserError: no cell can run at all, or the comparisons have different output folders.
    """
    console = Console()
    states = look(comparisons, force=force, console=console)
    tiny = all(state.cell.settled.backbone.startswith(EMBEDDED) for state in states)
    places = slots(jobs, tiny=tiny)[: max(sum(s.status != DONE for s in states), 1)]
    say(console, headline(states, len(places)))
    with view(states, len(places), console=console) as shown:
        logs = comparisons[0].folder.parent / "logs"
        runner(states, places, logs, force=force, changed=shown.changed).run(shown.tick)
    conclude(comparisons, console)
    return report_failed(states, console)


def report_failed(states: Sequence[CellState], console: Console) -> int:
    """Print the cells that failed, each with its reason; return how many there are."""
    failed = [state for state in states if state.status == FAILED]
    for state in failed:
        say(console, f"failed: {state.cell}: {state.reason}")
    return len(failed)


def look(comparisons: Sequence[Comparison], *, force: bool, console: Console) -> list[CellState]:
    """Return the state of every cell, and print those that can't run; raises as `run_grid` does."""
    outputs = {comparison.output for comparison in comparisons}
    if len(outputs) > 1:
        several = ", ".join(map(str, sorted(outputs)))
        raise UserError(
            f"output.dir: a report covers one output folder, and these comparisons have several: {several}"
        )
    cells = [cell for comparison in comparisons for cell in comparison.cells]
    states = survey(cells, force=force, say=partial(say, console))
    for state in states:
        if state.status == FAILED:
            say(console, line(state, states))
    return states


def conclude(comparisons: Sequence[Comparison], console: Console) -> None:
    """Print and write the results; for a comparison without a single record, print the reason."""
    outcomes: list[ComparisonOutcome] = []
    results: list[Result] = []
    with suppress(UserError):  # no record yet
        results = read_results(comparisons[0].output)
    for comparison in comparisons:
        try:
            outcomes.append(outcome(comparison, results))
        except UserError as error:
            say(console, str(error))
    if not outcomes:
        return
    say(console, render([item.table for item in outcomes], "text"))
    say(console, f"wrote {write_all(outcomes, command_line())}")
    for item in outcomes:
        say(console, f"wrote {item.comparison.folder}")
