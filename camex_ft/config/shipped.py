"""The configurations that come with the package: find, list and copy them.

They live in `configs/` of the checkout, and the package holds a link to that folder, which a wheel turns into copies:
the same names work from a checkout and from an installation.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from camex_ft.utils.durable import write_named
from camex_ft.utils.errors import UserError, nearest
from camex_ft.utils.folders import writing

ROOT = (Path(__file__).resolve().parent.parent / "configs").resolve()
SUFFIX = ".yaml"
SPECIFICATIONS = "tables"  # the folder of comparisons, which are no configurations
MERGES = "merge"  # the folder of specifications of static merges
STUDIES = "studies"  # the folder of specifications of `camex-ft branch`
ENGINES = "accelerate"  # the folder of accelerate's own configurations, one an engine


@dataclass(frozen=True)
class Shipped:
    """One configuration of the package.

    Attributes:
        name: path below `configs/` without its suffix, such as ``protocols/ties-ca``.
        path: the file.
        summary: the first line of its header.
    """

    name: str
    path: Path
    summary: str


def list_configs() -> list[Shipped]:
    """Return all shipped configurations, those at the top first."""
    others = (f"{SPECIFICATIONS}/", f"{MERGES}/", f"{STUDIES}/")
    return [shipped for shipped in _list() if not shipped.name.startswith(others)]


def list_specifications() -> list[Shipped]:
    """Return the specifications of comparisons that come with the package."""
    return [shipped for shipped in _list() if shipped.name.startswith(f"{SPECIFICATIONS}/")]


def list_merges() -> list[Shipped]:
    """Return the specifications of static merges that come with the package."""
    return [shipped for shipped in _list() if shipped.name.startswith(f"{MERGES}/")]


def list_studies() -> list[Shipped]:
    """Return the specifications of `camex-ft branch` that come with the package."""
    return [shipped for shipped in _list() if shipped.name.startswith(f"{STUDIES}/")]


def find_config(name: str | Path, *, beside: Path | None = None) -> Path:
    """Return the file that `name` means: a path (from the folder `beside`, if given), else a shipped configuration.

    A shipped configuration goes by its name, or by its path in the checkout: ``glue`` or ``configs/glue.yaml``, never
    ``glue.yaml``, which is a file of the user's. A file that does not exist is returned as the path that it would have,
    for the reader to report.
    """
    path = expand(name)
    path = path if beside is None or path.is_absolute() else Path(os.path.normpath(beside / path))
    named = not str(name).endswith(SUFFIX) or str(name).startswith("configs/")
    if os.path.isfile(path) or not named:
        return path
    return _shipped(str(name)) or path


def engine_file(name: str) -> Path:
    """Return accelerate's configuration for an engine: ``configs/accelerate/<name>.yaml``."""
    return _relative(ROOT / ENGINES / (name + SUFFIX))


def expand(path: str | Path) -> Path:
    """Return `path` with a leading ``~`` expanded, if there is such a home."""
    return Path(os.path.expanduser(path))


def copy_config(name: str, destination: str | Path) -> Path:
    """Copy the shipped configuration `name` to a new file, or into an existing folder, and return the new file.

    Raises:
        UserError: there is no such configuration, the target exists, or it can't be written.
    """
    source, target = _shipped(name), expand(destination)
    if source is None:
        raise UserError(f"there is no configuration '{name}'.{suggest(name)} See `camex-ft ls configs`.")
    target = (
        target / source.name if os.path.isdir(target) else target
    )  # not Path's own: it raises for long names
    if os.path.lexists(target):
        raise UserError(f"{target} exists already and is not overwritten: choose another name")
    with writing(target):
        write_named(target, source.read_bytes())
    return target


def suggest(name: str | Path, among: Iterable[str] = ()) -> str:
    """Return a hint at the shipped configuration, or the name in `among`, that is nearest to `name`."""
    return nearest(_short(str(name)), [*(shipped.name for shipped in _list()), *among])


def _list() -> list[Shipped]:
    paths = sorted(ROOT.rglob(f"*{SUFFIX}"), key=lambda p: (len(p.relative_to(ROOT).parts), p))
    return [Shipped(_name(path), path, _header(path)) for path in paths if not _is_engine(path)]


def _is_engine(path: Path) -> bool:
    return path.parent == ROOT / ENGINES


def _name(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def _short(name: str) -> str:
    return name.removeprefix("./").removeprefix("configs/").removesuffix(SUFFIX)


def _header(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def _shipped(name: str) -> Path | None:
    path = Path(os.path.normpath(ROOT / (_short(name) + SUFFIX)))
    inside = ROOT in path.parents and not _is_engine(path)
    return _relative(path) if os.path.isfile(path) and inside else None


def _relative(path: Path) -> Path:
    """Return `path` from the working folder if it lies inside: messages get shorter."""
    working = Path.cwd()
    return path.relative_to(working) if working in path.parents else path
