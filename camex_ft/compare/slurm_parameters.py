"""Parameters that may be asked of a SLURM cluster for each job: ``--slurm KEY=VALUE``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from camex_ft.utils.errors import UserError, nearest


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
    # a line break, or what a terminal obeys, would end up in the script
    if not text or not text.isprintable():
        raise ValueError("a text on one line")
    return text


# what may be asked of the cluster: submitit's name and the value, read from text
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


def read_parameters(given: Sequence[str]) -> dict[str, str]:
    """Return ``KEY=VALUE`` texts as a mapping.

    Raises:
        UserError: a key is not among `PARAMETERS`, occurs twice or has no value.
    """
    made: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        key = key.strip()
        if key not in PARAMETERS:
            known = ", ".join(PARAMETERS)
            raise UserError(f"--slurm: there is no '{key}'.{nearest(key, PARAMETERS)} Known: {known}")
        if not equals or key in made:
            problem = "occurs twice" if key in made else "has no value"
            raise UserError(f"--slurm: {key} {problem}; expected {key}=VALUE, once")
        made[key] = value.strip()
    convert(made)
    return made


def convert(parameters: Mapping[str, str]) -> dict[str, Any]:
    """Return what submitit is told, with defaults: one GPU, four cores and a day for each job."""
    made: dict[str, Any] = dict(DEFAULTS)
    if "gres" in parameters:  # says itself which GPUs
        del made["gpus_per_node"]
    for key, text in parameters.items():
        name, read = PARAMETERS[key]
        try:
            made[name] = read(text)
        except ValueError as error:
            raise UserError(f"--slurm: {key}: expected {error}, got '{text}'") from None
    if made.get("gpus_per_node") == 0:
        del made["gpus_per_node"]
    return made


def check_folder(folder: Path) -> None:
    """Raise `UserError` where the path of a jobs' folder cannot stand in a script: it goes into its head as it is."""
    if not str(folder).isprintable():
        raise UserError(
            f"--on slurm: the folder of the jobs, {str(folder)!r}, cannot stand in a job's script; expected a path "
            "without line breaks or control characters"
        )


def with_gpu(parameters: Mapping[str, str]) -> bool:
    """Return whether the jobs will have a GPU, whatever there is where they are submitted."""
    made = convert(parameters)
    return "gres" in made or "gpus_per_node" in made
