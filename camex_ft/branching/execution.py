"""Run a study: its stages in order, by the processes of a comparison, then the scores and the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from camex_ft.branching.source_scores import score_study
from camex_ft.branching.stages import Study, StudyStep
from camex_ft.branching.verdict import write_results
from camex_ft.compare.grid import headline, line, report_failed, survey, view
from camex_ft.compare.running import DONE, FAILED, CellState, Runner, slots
from camex_ft.config.backbones import EMBEDDED
from camex_ft.results import command_line
from camex_ft.utils.errors import UserError
from camex_ft.utils.escaping import say

States = dict[tuple[str, int], CellState]  # by label of the step and seed


def run_study(
    study: Study, *, jobs: int | None = None, force: bool = False, runner: Callable[..., Runner] = Runner
) -> int:
    """Run the missing steps, score all rows, print the table and write the report; return how many runs failed.

    A step that fails stops those that need it; the others go on.

    Args:
        study: with its steps.
        jobs: how many runs at a time; see `running.slots`.
        force: run finished steps again.
        runner: `Runner`, or a subclass.

    Raises:
        UserError: none of a stage's runs can begin.
    """
    console = Console()
    places = slots(jobs, tiny=study.base.backbone.startswith(EMBEDDED))
    states: States = {}
    for n, stage in enumerate(study.stages, start=1):
        trained = [step for step in stage if not step.untrained]
        waiting = _begin_stage(study, trained, states, force=force, console=console)
        if not waiting:
            continue
        say(console, f"stage {n} of {len(study.stages)}: {headline(waiting, len(places))}")
        with view(waiting, len(places), console=console) as shown:
            logs = study.folder / "logs"
            runner(waiting, places, logs, force=force, changed=shown.changed).run(shown.tick)
    scores = score_study(study, _finished(study, states), tell=partial(say, console))
    write_results(study, scores, command_line(), tell=partial(say, console))
    return report_failed(list(states.values()), console)


def _begin_stage(
    study: Study, steps: Sequence[StudyStep], states: States, *, force: bool, console: Console
) -> list[CellState]:
    """Add the states of a stage's runs to `states`, and return those of runs that have all they need."""
    runs, cells = _finished(study, states), []
    for step in steps:
        for seed in study.spec.seed_list():
            missing = next((label for label in step.needs if (label, seed) not in runs), None)
            if missing is None:
                cells.append(study.cell(step, seed, runs))
                continue
            reason = f"it needs '{missing}', which failed"
            state = CellState(cell=study.cell(step, seed), status=FAILED, reason=reason)
            states[step.label, seed] = state
            say(console, line(state, [state]))
    ready = survey(cells, force=force) if cells else []
    by_row = {(state.cell.row, state.cell.seed): state for state in ready}
    for cell in cells:
        if (cell.row, cell.seed) not in by_row:
            raise UserError(f"'{cell.row}' is the same run as another of this stage: their data are equal")
    states |= by_row
    return ready


def _finished(study: Study, states: States) -> dict[tuple[str, int], Path]:
    runs = study.base.output.path / "runs"
    return {key: runs / state.name for key, state in states.items() if state.status == DONE}
