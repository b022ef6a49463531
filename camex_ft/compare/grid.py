"""Run what is missing of comparisons, show it as it goes, and write what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from rich.console import Console

from camex_ft.compare.cells import Comparison
from camex_ft.compare.live import headline, line, view
from camex_ft.compare.outcome import Outcome, outcome, write_all
from camex_ft.compare.running import DONE, FAILED, Runner, State, slots
from camex_ft.compare.survey import survey
from camex_ft.config.backbones import EMBEDDED
from camex_ft.results import command_line
from camex_ft.results.entries import Result, read_results
from camex_ft.results.render import render
from camex_ft.utils.errors import UserError
from camex_ft.utils.escaping import say


def run_grid(
    comparisons: Sequence[Comparison],
    *,
    jobs: int | None = None,
    force: bool = False,
    runner: Callable[..., Runner] = Runner,
) -> int:
    """Run what is missing, print the tables, write tables, pictures and report; return how many cells failed.

    Args:
        comparisons: their runs share one output folder, and a cell that two of them have runs once.
        jobs: how many cells run at a time; see `running.slots`.
        force: run again what is done.
        runner: `Runner`, or one of its kind.

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


def look(comparisons: Sequence[Comparison], *, force: bool, console: Console) -> list[State]:
    """Return the state of every cell before anything runs, and print which of them can't; raises as `run_grid` does."""
    outputs = {comparison.output for comparison in comparisons}
    if len(outputs) > 1:
        raise UserError(
            f"one report needs one output folder, and there are {', '.join(map(str, sorted(outputs)))}"
        )
    cells = [cell for comparison in comparisons for cell in comparison.cells]
    states = survey(cells, force=force, say=partial(say, console))
    for state in states:
        if state.status == FAILED:
            say(console, line(state, states))
    return states


def report_failed(states: Sequence[State], console: Console) -> int:
    """Print the cells that failed, each with its reason; return how many there are."""
    failed = [state for state in states if state.status == FAILED]
    for state in failed:
        say(console, f"failed: {state.cell}: {state.reason}")
    return len(failed)


def conclude(comparisons: Sequence[Comparison], console: Console) -> None:
    """Print and write what there is; a comparison without a single record says so."""
    made: list[Outcome] = []
    results: list[Result] = []
    with suppress(UserError):  # there is none
        results = read_results(comparisons[0].output)
    for comparison in comparisons:
        try:
            made.append(outcome(comparison, results))
        except UserError as error:
            say(console, str(error))
    if not made:
        return
    say(console, render([each.table for each in made], "text"))
    say(console, f"wrote {write_all(made, command_line())}")
    for each in made:
        say(console, f"wrote {each.comparison.folder}")
