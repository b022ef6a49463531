"""Provenance of a run without private data: versions, commit, kind of host. Records have no absolute paths."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from camex_ft.results.record import Software
from camex_ft.utils import system

# The core dependencies of setup.cfg, whose versions can change the results of a run.
PACKAGES = (
    *(
        "torch",
        "transformers",
        "sentencepiece",
        "protobuf",
        "accelerate",
        "peft",
        "datasets",
        "huggingface_hub",
    ),
    *("evaluate", "safetensors", "filelock", "pydantic", "pyyaml", "scikit-learn", "scipy", "numpy"),
    *("matplotlib", "pillow", "typer", "rich", "packaging"),
)
SOURCES = Path(__file__).resolve().parents[2]
# An absolute path where a word can start: hub ids, fractions and URLs are left alone.
ABSOLUTE = re.compile(r"""(?<![^\s'"=,:;\[({])(?!//[^/])~?/[^\s'",;:\])}]*[^\s'",;:\])}/]/*""")
COMMAND = "CAMEX_FT_COMMAND"


def versions() -> dict[str, str]:
    """Return the version of Python, of camex_ft and of each core package that is installed."""
    installed = {"python": platform.python_version()}
    for name in ("camex_ft", *PACKAGES):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def source_state(folder: Path = SOURCES) -> tuple[str | None, bool | None]:
    """Return (commit, dirty) of the checkout that the package runs from; (None, None) outside git.

    Dirty: the package or the configs differ from the commit; new results do not count.
    """
    git = ["git", "-C", str(folder)]
    try:
        # A package installed below somebody else's repository is not tracked by it.
        _output(*git, "ls-files", "--error-unmatch", "camex_ft/__init__.py")
        commit = _output(*git, "rev-parse", "HEAD")
        return commit, bool(_output(*git, "status", "--porcelain", "--", "camex_ft", "configs"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def host_kind(gpus: Sequence[str] = ()) -> str:
    """Return "cpu-<cores>", or "cuda-<name>-x<count>" for the given names of GPUs."""
    if gpus:
        return f"cuda-{re.sub(r'[^a-z0-9]+', '-', gpus[0].lower()).strip('-')}-x{len(gpus)}"
    return f"cpu-{system.cores()}"


def environment(*, gpus: Sequence[str] = ()) -> Software:
    """Return the record's entry for the software and the kind of host; `gpus` are the names of those in use."""
    commit, dirty = source_state()
    return Software(versions=versions(), commit=commit, dirty=dirty, host=host_kind(gpus))


def command_line(argv: Sequence[str] | None = None) -> str:
    """Return the command line of the user, quoted for a shell, without absolute paths.

    One of several launched processes returns that of the launcher, from the environment variable `COMMAND`.
    """
    if argv is None and COMMAND in os.environ:
        return os.environ[COMMAND]
    program, *arguments = sys.argv if argv is None else argv
    name = Path(program).name
    own = "camex-ft" if name == "__main__.py" else name  # python -m camex_ft
    return shlex.join([own, *(strip_paths(argument) for argument in arguments)])


def strip_paths(value: Any) -> Any:
    """Return `value` (nested dicts, lists, tuples, strings, paths) without absolute paths.

    A path below the working directory becomes relative to it, so that a command still runs; others are reduced to their
    last part.
    """
    if isinstance(value, dict):
        return {k: strip_paths(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(strip_paths(v) for v in value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
        return _shorten(value) if os.path.isabs(value) else value
    return ABSOLUTE.sub(lambda m: _shorten(m.group()), value) if isinstance(value, str) else value


def _shorten(path: str) -> str:
    inside = os.path.relpath(os.path.expanduser(path))
    return os.path.basename(path.rstrip("/")) if inside.startswith("..") else inside


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
