"""The cells of comparisons as jobs of submitit: an array on a SLURM cluster, or on this machine, as a trial.

A job is one cell, with one GPU unless told otherwise, and runs what `worker` runs. When the cluster takes its node
away, or its time is up, it is queued again and goes on from its last checkpoint.
"""

from __future__ import annotations

import getpass
import json
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console

from camex_ft.compare.cells import Comparison
from camex_ft.compare.grid import conclude, look
from camex_ft.compare.job import Job
from camex_ft.compare.running import FAILED, WAITING, Process, Runner, Slot, State, request
from camex_ft.compare.slurm_parameters import check_folder, convert
from camex_ft.utils.durable import write_atomically
from camex_ft.utils.errors import UserError
from camex_ft.utils.escaping import say

if TYPE_CHECKING:
    from submitit import LocalJob
    from submitit import SlurmJob as Submitted

NAME = "camex-ft"
FOLDER = "jobs"  # beside the comparisons
SUBMITTED = "submitted.json"
REQUEUED = 50  # times that a job may run out of time and go on
MOST = 64  # jobs at a time


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Submitted array of jobs.

    Attributes:
        jobs: new ones, of submitit.
        queued: cells whose job is in the queue already.
        failed: cells that can't run.
    """

    jobs: Sequence[Submitted[None]]
    queued: int = 0
    failed: int = 0


def submit(
    comparisons: Sequence[Comparison],
    *,
    parameters: Mapping[str, str],
    folder: Path | None = None,
    most: int | None = None,
    force: bool = False,
) -> Submission:
    """Submit an array with a job for each cell that is missing and not in the queue, and return at once.

    Where nothing is missing, tables, pictures and report are written.

    Args:
        comparisons: as for `grid.run_grid`.
        parameters: what is asked of the cluster, by the names in `PARAMETERS`.
        folder: of jobs and their logs; by default beside the comparisons. Nodes need to see it.
        most: how many jobs run at a time.
        force: run again what is done.

    Raises:
        UserError: there is no SLURM here, it refuses the jobs, or no cell can run at all.
    """
    submitit = _submitit()
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise UserError(
                f"--on slurm: there is no {program} here; expected a node that submits jobs to a SLURM cluster"
            )
    console = Console()
    states = look(comparisons, force=force, console=console)
    failed = sum(state.status == FAILED for state in states)
    missing = [state for state in states if state.status == WAITING]
    if not missing:
        conclude(comparisons, console)
        return Submission(jobs=(), failed=failed)
    folder = (folder or comparisons[0].folder.parent / FOLDER).absolute()
    check_folder(folder)
    known = _read(folder / SUBMITTED)
    waiting = _queued(console) if known else set()
    new = [state for state in missing if known.get(state.name) not in waiting]
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=REQUEUED)
    try:
        executor.update_parameters(job_name=NAME, array_parallelism=most or MOST, **convert(parameters))
        jobs = executor.submit_array([Job(request=request(s.cell, force)) for s in new]) if new else []
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"--on slurm: sbatch refuses the jobs: {' '.join(str(error).split())}") from error
    made = {state.name: job.job_id for state, job in zip(new, jobs, strict=True)}
    if made:
        write_atomically(folder / SUBMITTED, json.dumps({**known, **made}, indent=1))
    return Submission(jobs=jobs, queued=len(missing) - len(new), failed=failed)


@dataclass
class LocalJobs(Runner):
    """Runs cells as `submit` does, with submitit, but on this machine and to their end; see `Runner`.

    Attributes:
        parameters: by the names in `PARAMETERS`; of them, `time` and `setup` mean something here.
    """

    parameters: Mapping[str, str] = field(default_factory=dict)

    def launch(self, slot: Slot, state: State) -> Process:
        """Start a cell as a job and return it."""
        made = convert(self.parameters)
        executor = _submitit().LocalExecutor(folder=self.logs.absolute(), max_num_timeout=REQUEUED)
        executor.update_parameters(timeout_min=made["time"], setup=made.get("setup", ()))
        started = Job(request=request(state.cell, self.force), environment=slot.environment)
        job = cast("LocalJob[None]", executor.submit(started))
        state.log = job.paths.stderr
        state.log.touch()  # the job makes it when it starts
        return _Started(job)


@dataclass
class _Started:
    """A job of this machine as what `Runner` looks after."""

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
        """End it and what it has started."""
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
    """Return which job each cell was submitted as, by the name of its run."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _queued(console: Console) -> set[str]:
    """Return the ids of this user's jobs that wait or run."""
    command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        line = f"{shlex.join(command)} fails: what waits in the queue is not known, and is submitted again"
        say(console, line)
        return set()
    return set(shown.stdout.split())
