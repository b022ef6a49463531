"""Places where the cells of comparisons run: ``camex-ft compare --on``. Each is imported when it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from camex_ft.compare.slurm_parameters import read_parameters, with_gpu
from camex_ft.utils.errors import UserError, nearest

if TYPE_CHECKING:
    from camex_ft.compare.cells import Comparison
    from camex_ft.config import Environment

HERE, SLURM, LOCAL_JOBS = PLACES = ("here", "slurm", "local-jobs")


def read(on: str, given: Sequence[str]) -> dict[str, str]:
    """Return what each job asks for, by key.

    Args:
        on: one of `PLACES`.
        given: ``KEY=VALUE`` texts; see `slurm_parameters.PARAMETERS`.

    Raises:
        UserError: there is no such place, or no such parameter of it.
    """
    if on not in PLACES:
        raise UserError(f"--on: there is no '{on}'.{nearest(on, PLACES)} Known: {', '.join(PLACES)}")
    if given and on == HERE:
        raise UserError(f"--slurm is for jobs: expected --on {SLURM} or --on {LOCAL_JOBS} beside it")
    return read_parameters(given)


def environment(on: str, parameters: Mapping[str, str]) -> Environment | None:
    """Return what cells will find where they run; None where that is what this machine has.

    Jobs of a cluster find the GPU that they ask for, whatever the node has that they are submitted from.
    """
    if on != SLURM:
        return None
    from camex_ft.config import Environment

    gpu = with_gpu(parameters)
    return Environment(cuda=lambda: gpu)


def run(
    on: str,
    comparisons: Sequence[Comparison],
    *,
    parameters: Mapping[str, str],
    jobs: int | None = None,
    force: bool = False,
) -> int:
    """Run what is missing of comparisons, or submit it; return how many cells failed.

    Args:
        on: one of `PLACES`.
        comparisons: as for `grid.run_grid`.
        parameters: what each job asks for.
        jobs: how many cells run at a time.
        force: run again what is done.
    """
    if on == SLURM:
        return _submit(comparisons, parameters, jobs=jobs, force=force)
    from camex_ft.compare.grid import run_grid

    if on == HERE:
        return run_grid(comparisons, jobs=jobs, force=force)
    from camex_ft.compare.slurm import LocalJobs

    return run_grid(comparisons, jobs=jobs, force=force, runner=partial(LocalJobs, parameters=parameters))


def _submit(
    comparisons: Sequence[Comparison], parameters: Mapping[str, str], *, jobs: int | None, force: bool
) -> int:
    """Submit what is missing, and say how to go on."""
    from camex_ft.compare.slurm import submit

    made = submit(comparisons, parameters=parameters, most=jobs, force=force)
    if made.jobs:
        first = made.jobs[0]
        number, _, _ = first.job_id.partition("_")
        print(f"submitted as job {number}, cells: {len(made.jobs)}; logs: {first.paths.folder}")
    if made.queued:
        print(f"missing cells that are in the queue already: {made.queued}")
    if made.jobs or made.queued:
        profile = f"profile={comparisons[0].profile}"
        print(f"What is done so far, at any time: camex-ft table SPEC {profile}")
        print("When nothing is missing any more, the same command writes tables, pictures and report.")
    return made.failed
