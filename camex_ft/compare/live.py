"""The cells while they go: a table on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from camex_ft.compare.running import DONE, FAILED, RUNNING, WAITING, State
from camex_ft.results.summary import duration
from camex_ft.utils.escaping import one_line, say

STYLES = {DONE: "green", RUNNING: "cyan", WAITING: "dim", FAILED: "red"}
LONGEST = 100  # of a reason, in characters


@dataclass(frozen=True)
class View:
    """Receiver of the runner's events: `changed` of a cell, `tick` a few times a second."""

    changed: Callable[[State], None]
    tick: Callable[[], None]


@contextmanager
def view(states: Sequence[State], slots: int, *, console: Console | None = None) -> Iterator[View]:
    """Show `states` while the body runs.

    Args:
        states: of all cells; they change meanwhile.
        slots: how many run at a time, for the time left.
        console: where; standard output by default.
    """
    console = console or Console()
    if not console.is_terminal:

        def changed(state: State) -> None:
            say(console, line(state, states))

        yield View(changed, lambda: None)
        return
    with Live(console=console, auto_refresh=False) as live:

        def show() -> None:
            live.update(picture(states, slots), refresh=True)

        yield View(lambda state: show(), show)


def line(state: State, states: Sequence[State]) -> str:
    """Return what has become of a cell, in a line: "[3/12] glue/sst2 ties-ca seed 0: done in 42.0 s"."""
    ended = sum(s.status in (DONE, FAILED) for s in states)
    words = {
        RUNNING: "running",
        DONE: f"done in {duration(state.seconds)}",
        FAILED: f"failed: {state.reason}" + (f" (see {state.log})" if state.log else ""),
    }
    return f"[{ended}/{len(states)}] {state.cell}: {words.get(state.status, state.status)}"


def picture(states: Sequence[State], slots: int) -> RenderableType:
    """Return the table of cells, rows x tasks, what is running with its time left, and what has failed."""
    tasks = list(dict.fromkeys(s.cell.task for s in states))
    rows = list(dict.fromkeys(s.cell.row for s in states))
    table = Table()
    table.add_column("", no_wrap=True)
    for task in tasks:
        table.add_column(Text(one_line(task)))
    for row in rows:
        some = [[s for s in states if s.cell.task == task and s.cell.row == row] for task in tasks]
        table.add_row(Text(one_line(row)), *(cell(each) for each in some))
    lines = [
        Text(one_line(f"running: {s.cell}, {_left(s)}"), STYLES[RUNNING])
        for s in states
        if s.status == RUNNING
    ]
    lines += [
        Text(one_line(f"failed: {s.cell}: {s.reason[:LONGEST]}"), STYLES[FAILED])
        for s in states
        if s.status == FAILED
    ]
    return Group(Text(headline(states, slots), "bold"), table, *lines)


def cell(states: Sequence[State]) -> Text:
    """Return the states of the seeds in one field of the table: "2 done, 1 waiting"."""
    counts = Counter(s.status for s in states)
    text = Text()
    for status in (DONE, RUNNING, FAILED, WAITING):
        if counts[status]:
            share = max((s.share for s in states if s.status == status), default=0.0)
            word = f"running {share:.0%}" if status == RUNNING and share else status
            text.append(", " if text else "").append(f"{counts[status]} {word}", STYLES[status])
    return text


def headline(states: Sequence[State], slots: int) -> str:
    """Return how many cells there are in which state, and the time left."""
    counts = Counter(s.status for s in states)
    words = [f"{counts[status]} {status}" for status in (DONE, RUNNING, WAITING, FAILED) if counts[status]]
    left = time_left(states, slots)
    return ", ".join(words) + (f"; about {duration(left)} left" if left else "")


def time_left(states: Sequence[State], slots: int) -> float | None:
    """Return the seconds that are left: of a cell that waits, the mean of its row's and else of all that ran now.

    None before there is anything to go by.
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


def _left(state: State) -> str:
    return "starting" if state.left is None else f"{state.share:.0%}, about {duration(state.left)} left"
