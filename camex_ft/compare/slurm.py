"""Run the cells of comparisons: here, or as jobs of submitit on a SLURM cluster, or as such jobs on this machine.

A job is one cell, with one GPU by default, and runs what `worker.main` runs. When the cluster takes its node away, or
its time is up, it is queued again and resumes from its last checkpoint.
"""

from __future__ import annotations

import getpass
import json
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console

from camex_ft.compare.cells import Comparison
from camex_ft.compare.grid import conclude, look, run_grid
from camex_ft.compare.places import HERE, SLURM, check_folder, convert
from camex_ft.compare.running import FAILED, WAITING, CellState, Process, Runner, Slot, request
from camex_ft.compare.worker import Job
from camex_ft.utils.durable import write_atomically
from camex_ft.utils.errors import UserError
from camex_ft.utils.escaping import say

if TYPE_CHECKING:
    from submitit import LocalJob

NAME = "camex-ft"
FOLDER = "jobs"  # beside the comparisons
SUBMITTED = "submitted.json"
REQUEUED = 50  # times that a job may run out of time and go on
MOST = 64  # jobs at a time


def run(
    on: str,
    comparisons: Sequence[Comparison],
    *,
    parameters: Mapping[str, str],
    jobs: int | None = None,
    force: bool = False,
) -> int:
    """Run or submit the missing cells of comparisons; return how many cells failed.

    Args:
        on: one of `places.PLACES`.
        comparisons: as for `grid.run_grid`.
        parameters: of each job.
        jobs: how many cells run at a time.
        force: run done cells again.
    """
    if on == SLURM:
        return submit(comparisons, parameters, jobs=jobs, force=force)
    if on == HERE:
        return run_grid(comparisons, jobs=jobs, force=force)
    return run_grid(comparisons, jobs=jobs, force=force, runner=partial(LocalJobs, parameters=parameters))


def submit(
    comparisons: Sequence[Comparison], parameters: Mapping[str, str], *, jobs: int | None, force: bool
) -> int:
    """Submit an array with a job for each cell that is missing and not in the queue, and return at once.

    If no cell is missing, tables, pictures and report are written.

    Args:
        comparisons, force: as for `grid.run_grid`.
        parameters: of each job, by the names in `places.PARAMETERS`.
        jobs: how many run at a time.

    Returns:
        the number of cells that cannot run.

    Raises:
        UserError: there is no SLURM here, it refuses the jobs, or no cell can run at all.
    """
    submitit = _submitit()
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise UserError(
                f"--on slurm: {program} is not installed here; run this on a node that submits jobs to a SLURM cluster"
            )
    console = Console()
    states = look(comparisons, force=force, console=console)
    failed = sum(state.status == FAILED for state in states)
    missing = [state for state in states if state.status == WAITING]
    if not missing:
        conclude(comparisons, console)
        return failed
    folder = (comparisons[0].folder.parent / FOLDER).absolute()
    check_folder(folder)
    known = _read(folder / SUBMITTED)
    queue = _queued(console) if known else set()
    new = [state for state in missing if known.get(state.name) not in queue]
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=REQUEUED)
    try:
        executor.update_parameters(job_name=NAME, array_parallelism=jobs or MOST, **convert(parameters))
        submitted = executor.submit_array([Job(request=request(s.cell, force)) for s in new]) if new else []
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"--on slurm: sbatch refused the jobs: {' '.join(str(error).split())}") from error
    if submitted:
        ids = {state.name: job.job_id for state, job in zip(new, submitted, strict=True)}
        write_atomically(folder / SUBMITTED, json.dumps({**known, **ids}, indent=1))
        first = submitted[0]
        number, _, _ = first.job_id.partition("_")
        print(f"submitted as job {number}, cells: {len(submitted)}; logs: {first.paths.folder}")
    if len(new) < len(missing):
        print(f"missing cells that are in the queue already: {len(missing) - len(new)}")
    print(f"To see the results so far, at any time: camex-ft table SPEC profile={comparisons[0].profile}")
    print("When no cell is missing any more, the same command writes tables, pictures and report.")
    return failed


@dataclass
class LocalJobs(Runner):
    """Runs cells with submitit as `submit` does, but on this machine, and waits for them; see `Runner`.

    Attributes:
        parameters: by the names in `places.PARAMETERS`; only `time` and `setup` have an effect here.
    """

    parameters: Mapping[str, str] = field(default_factory=dict)

    def launch(self, slot: Slot, state: CellState) -> Process:
        """Start a cell as a job and return it."""
        values = convert(self.parameters)
        executor = _submitit().LocalExecutor(folder=self.logs.absolute(), max_num_timeout=REQUEUED)
        executor.update_parameters(timeout_min=values["time"], setup=values.get("setup", ()))
        started = Job(request=request(state.cell, self.force), environment=slot.environment)
        job = cast("LocalJob[None]", executor.submit(started))
        state.log = job.paths.stderr
        state.log.touch()  # the job makes it when it starts
        return _Started(job)


@dataclass
class _Started:
    """A job on this machine, with the methods of a `Process`."""

    job: LocalJob[None]
    stdin: IO[str] | None = None
    stdout: IO[str] | None = None

    @property
    def returncode(self) -> int:
        """0 if it has left a result, and no error."""
        there = self.job.paths.result_pickle.exists()
        return 0 if there and self.job.exception() is None else 1

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self.returncode if self.job.done() else None

    def kill(self) -> None:
        """End the job and its processes."""
        self.job.cancel()

    def wait(self) -> int:
        """Return the exit code when it has ended."""
        self.job.wait()
        return self.returncode


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise UserError(
            "jobs need the package submitit, which is not installed: pip install 'submitit>=1.5'"
        ) from None
    return submitit


def _read(file: Path) -> dict[str, str]:
    """Return the id of the job of each submitted cell, by the name of its run."""
    try:
        ids = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return ids if isinstance(ids, dict) else {}


def _queued(console: Console) -> set[str]:
    """Return the ids of this user's jobs that wait or run."""
    command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        line = f"{shlex.join(command)} failed, so the queue is not known: cells that wait in it are submitted again"
        say(console, line)
        return set()
    return set(shown.stdout.split())
