"""Run the cells of comparisons: here, or as jobs of submitit on a SLURM cluster, or as such jobs on this machine.

A job is one cell, with one GPU by default, and runs what `worker.main` runs. When the cluster takes its node away, or
its time is up, it is queued again and resumes from its last checkpoint.

Light to import: the command line reads the names of places and parameters before anything runs.
"""

from __future__ import annotations

import getpass
import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console

from camex_ft.compare.running import FAILED, WAITING, CellState, Process, Runner, Slot, request
from camex_ft.compare.worker import Job
from camex_ft.utils.durable import write_atomically
from camex_ft.utils.errors import UserError, among
from camex_ft.utils.escaping import say

if TYPE_CHECKING:
    from submitit import LocalJob

    from camex_ft.compare.cells import Comparison
    from camex_ft.config import Environment

HERE, SLURM, LOCAL_JOBS = PLACES = ("here", "slurm", "local-jobs")
NAME = "camex-ft"
FOLDER = "jobs"  # beside the comparisons
SUBMITTED = "submitted.json"
REQUEUED = 50  # times that a job may run out of time and go on
MOST = 64  # jobs at a time

# -- parameters of jobs -----------------------------------------------------------------------------------------------


def _whole(text: str, *, least: int = 0, expected: str = "a whole number") -> int:
    if not text.isdecimal() or int(text) < least:
        raise ValueError(expected)
    return int(text)


def _gigabytes(text: str) -> str:
    try:
        size = round(float(text) * 1024)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError("a number of gigabytes")
    return f"{size}MB"


def _word(text: str) -> str:
    # a line break or control character would end up in the script
    if not text or not text.isprintable():
        raise ValueError("a text on one line")
    return text


WORDS = ("account", "constraint", "exclude", "gres", "mail_type", "mail_user", "nodelist", "partition", "qos")
# key of --slurm -> submitit's name, and the function that reads the value
PARAMETERS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    **{word: (word, _word) for word in WORDS},
    "cpus_per_task": ("cpus_per_task", _whole),
    "gpus_per_node": ("gpus_per_node", _whole),
    "mem_gb": ("mem", _gigabytes),
    "setup": ("setup", lambda text: [_word(text)]),
    "time": ("time", partial(_whole, least=1, expected="minutes, a whole number from 1")),
}
DEFAULTS = {"time": 24 * 60, "cpus_per_task": 4, "gpus_per_node": 1}


def read(on: str, texts: Sequence[str]) -> dict[str, str]:
    """Return the parameters of each job, by key.

    Raises:
        UserError: there is no such place, or a key is not among its parameters, occurs twice or has no valid value.
    """
    if on not in PLACES:
        raise UserError(f"--on: there is no '{on}'.{among(on, PLACES)}")
    if texts and on == HERE:
        raise UserError(f"--slurm is for jobs: add --on {SLURM} or --on {LOCAL_JOBS}, or leave it out")
    parameters: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if key not in PARAMETERS:
            raise UserError(f"--slurm: there is no '{key}'.{among(key, PARAMETERS)}")
        if not equals or key in parameters:
            problem = "occurs twice" if key in parameters else "has no value"
            raise UserError(f"--slurm: {key} {problem}; expected {key}=VALUE, once")
        parameters[key] = value.strip()
    convert(parameters)
    return parameters


def convert(parameters: Mapping[str, str]) -> dict[str, Any]:
    """Return submitit's parameters, with defaults: one GPU, four cores and a day for each job."""
    values: dict[str, Any] = dict(DEFAULTS)
    if "gres" in parameters:  # says itself which GPUs
        del values["gpus_per_node"]
    for key, text in parameters.items():
        name, read_value = PARAMETERS[key]
        try:
            values[name] = read_value(text)
        except ValueError as error:
            raise UserError(f"--slurm: {key}: expected {error}, got '{text}'") from None
    if values.get("gpus_per_node") == 0:
        del values["gpus_per_node"]
    return values


def environment(on: str, parameters: Mapping[str, str]) -> Environment | None:
    """Return the environment that cells find where they run; None for that of this machine.

    Jobs of a cluster have the GPU that they ask for, even if the submitting node has none.
    """
    if on != SLURM:
        return None
    from camex_ft.config import Environment

    gpu = not convert(parameters).keys().isdisjoint({"gres", "gpus_per_node"})
    return Environment(cuda=lambda: gpu)


def check_folder(folder: Path) -> None:
    """Raise `UserError` where the path of a jobs' folder cannot stand in a script: it goes into its head as it is."""
    if not str(folder).isprintable():
        raise UserError(
            f"--on slurm: the folder of the jobs, {str(folder)!r}, cannot be written into a job's script; expected a "
            "path without line breaks or control characters"
        )


# -- jobs -------------------------------------------------------------------------------------------------------------


def run(
    on: str,
    comparisons: Sequence[Comparison],
    *,
    parameters: Mapping[str, str],
    jobs: int | None = None,
    force: bool = False,
) -> int:
    """Run or submit the missing cells in one of `PLACES`, as `grid.run_grid` does; return how many cells failed."""
    from camex_ft.compare.grid import run_grid

    if on == SLURM:
        return submit(comparisons, parameters, jobs=jobs, force=force)
    runner = Runner if on == HERE else partial(LocalJobs, parameters=parameters)
    return run_grid(comparisons, jobs=jobs, force=force, runner=runner)


def submit(
    comparisons: Sequence[Comparison], parameters: Mapping[str, str], *, jobs: int | None, force: bool
) -> int:
    """Submit an array with a job for each cell that is missing and not in the queue, and return at once.

    If no cell is missing, tables, pictures and report are written. It returns the number of cells that cannot run.

    Raises:
        UserError: there is no SLURM here, it refuses the jobs, or no cell can run at all.
    """
    from camex_ft.compare.grid import conclude, look

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
        parameters: by the names in `PARAMETERS`; only `time` and `setup` have an effect here.
    """

    parameters: Mapping[str, str] = field(default_factory=dict)

    def launch(self, slot: Slot, state: CellState) -> Process:
        """Start a cell as a job and return it."""
        values = convert(self.parameters)
        executor = _submitit().LocalExecutor(folder=self.logs.absolute(), max_num_timeout=REQUEUED)
        executor.update_parameters(timeout_min=values["time"], setup=values.get("setup", ()))
        cell = Job(request=request(state.cell, self.force), environment=slot.environment)
        job = cast("LocalJob[None]", executor.submit(cell))
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
