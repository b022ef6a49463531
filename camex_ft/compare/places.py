"""Places where the cells of comparisons can run (``camex-ft compare --on``), and the parameters of SLURM jobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camex_ft.utils.errors import UserError, nearest

if TYPE_CHECKING:
    from camex_ft.config import Environment


HERE, SLURM, LOCAL_JOBS = PLACES = ("here", "slurm", "local-jobs")


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("a whole number")
    return int(text)


def _minutes(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("minutes, a whole number from 1")
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


# key of --slurm -> submitit's name, and the function that reads the value
PARAMETERS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "account": ("account", _word),
    "constraint": ("constraint", _word),
    "cpus_per_task": ("cpus_per_task", _whole),
    "exclude": ("exclude", _word),
    "gpus_per_node": ("gpus_per_node", _whole),
    "gres": ("gres", _word),
    "mail_type": ("mail_type", _word),
    "mail_user": ("mail_user", _word),
    "mem_gb": ("mem", _gigabytes),
    "nodelist": ("nodelist", _word),
    "partition": ("partition", _word),
    "qos": ("qos", _word),
    "setup": ("setup", lambda text: [_word(text)]),
    "time": ("time", _minutes),
}
DEFAULTS = {"time": 24 * 60, "cpus_per_task": 4, "gpus_per_node": 1}


def read_parameters(texts: Sequence[str]) -> dict[str, str]:
    """Return ``KEY=VALUE`` texts as a mapping.

    Raises:
        UserError: a key is not among `PARAMETERS`, occurs twice or has no value.
    """
    parameters: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if key not in PARAMETERS:
            known = ", ".join(PARAMETERS)
            raise UserError(f"--slurm: there is no '{key}'.{nearest(key, PARAMETERS)} Known: {known}")
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
        name, read = PARAMETERS[key]
        try:
            values[name] = read(text)
        except ValueError as error:
            raise UserError(f"--slurm: {key}: expected {error}, got '{text}'") from None
    if values.get("gpus_per_node") == 0:
        del values["gpus_per_node"]
    return values


def check_folder(folder: Path) -> None:
    """Raise `UserError` where the path of a jobs' folder cannot stand in a script: it goes into its head as it is."""
    if not str(folder).isprintable():
        raise UserError(
            f"--on slurm: the folder of the jobs, {str(folder)!r}, cannot be written into a job's script; expected a "
            "path without line breaks or control characters"
        )


def with_gpu(parameters: Mapping[str, str]) -> bool:
    """Return whether the jobs will have a GPU, independently of the submitting node."""
    values = convert(parameters)
    return "gres" in values or "gpus_per_node" in values


def read(on: str, texts: Sequence[str]) -> dict[str, str]:
    """Return the parameters of each job, by key.

    Args:
        on: one of `PLACES`.
        texts: ``KEY=VALUE`` texts; see `PARAMETERS`.

    Raises:
        UserError: there is no such place, or no such parameter of it.
    """
    if on not in PLACES:
        raise UserError(f"--on: there is no '{on}'.{nearest(on, PLACES)} Known: {', '.join(PLACES)}")
    if texts and on == HERE:
        raise UserError(f"--slurm is for jobs: add --on {SLURM} or --on {LOCAL_JOBS}, or leave it out")
    return read_parameters(texts)


def environment(on: str, parameters: Mapping[str, str]) -> Environment | None:
    """Return the environment that cells find where they run; None for that of this machine.

    Jobs of a cluster have the GPU that they ask for, even if the submitting node has none.
    """
    if on != SLURM:
        return None
    from camex_ft.config import Environment

    gpu = with_gpu(parameters)
    return Environment(cuda=lambda: gpu)
