"""The cells of a comparison: each a configuration, and the command that runs it alone."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from camex_ft.backbones.donors import checkpoints_of, local_content_of
from camex_ft.compare.spec import Spec, key_of, overrides_of
from camex_ft.config import Config, ConfigErrors, Environment, Problem, config_hash, load_config, resolve
from camex_ft.config.problems import Origin
from camex_ft.config.shipped import ROOT

TASK = "{task}"
LONGEST = 60  # characters of a folder's name, each of up to 4 bytes; a file system takes 255


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell: a task by its id, a row by its label with the values of its keys, and a seed."""

    task: str
    row: str
    keys: Mapping[str, Any]
    seed: int
    config: str  # an argument of `camex-ft run`, as are the overrides
    overrides: tuple[str, ...]
    settled: Config = field(repr=False)  # the resolved configuration

    @property
    def command(self) -> str:
        """The command that runs it alone."""
        return shlex.join(["camex-ft", "run", self.config, *self.overrides])

    def __str__(self) -> str:
        return f"{self.task} {self.row} seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A specification with its cells."""

    name: str  # of its folder, such as "glue-sst2"
    spec: Spec  # as it is under the profile in force, which `reason` explains
    profile: str
    reason: str
    cells: tuple[Cell, ...]  # by task, then row, then seed

    @property
    def title(self) -> str:
        """Its heading."""
        return self.spec.title or ", ".join(dict.fromkeys(cell.task for cell in self.cells))

    @property
    def output(self) -> Path:
        """The output folder that all of its runs share."""
        return self.cells[0].settled.output.path

    @property
    def folder(self) -> Path:
        """Folder of its tables, pictures and logs."""
        return self.output / "comparisons" / self.name


def make_comparison(
    spec: Spec,
    *,
    name: str = "",
    overrides: Sequence[str] = (),
    seeds: int | list[int] | None = None,
    environment: Environment | None = None,
) -> Comparison:
    """Return a specification's cells on this machine. Neither data nor weights need to be there.

    Args:
        name: of the comparison; by default its task's.
        overrides: further ``key=value`` for every cell; they override the specification, except for its rows.
        seeds: in place of the specification's.

    Raises:
        ConfigErrors: the mistakes of all cells together.
    """
    environment = environment or Environment()
    try:
        written = load_config(spec.config, [*overrides_of(spec.set), *overrides])
        first, reason = resolve(written, environment, needs=False)
    except ConfigErrors as errors:
        raise ConfigErrors(map(spec.placed, errors.problems)) from None
    here = spec.under(first.profile)
    if seeds is not None:
        here = here.model_copy(update={"seeds": seeds})
    contents = cache(local_content_of)
    cells: list[Cell] = []
    problems: list[Problem] = list(_idle(here, overrides))
    for task, changes in _tasks(here, first, overrides).items():
        suite, _, last = task.rpartition("/")
        own = [o.replace(TASK, last) for o in [*overrides_of({**here.set, **changes}), *overrides]]
        own = [*(o for o in own if key_of(o) != "profile"), f"profile={first.profile}"]
        own += [*([f"task.suite={suite}"] if suite else []), f"task.name={last}"]
        own = list({key_of(o): o for o in own}.values())  # the last of a key wins
        known: dict[str, str] = {}
        for label, keys in here.row_list():
            try:
                row_cells = list(_seeds(here, label, keys, [*own, *overrides_of(keys)], environment))
            except ConfigErrors as errors:
                problems += map(here.placed, errors.problems)
                continue
            settled = row_cells[0].settled
            content = contents(settled.backbone, checkpoints_of(settled.upcycle)) or ""
            same = known.setdefault(config_hash(settled, backbone=content), label)
            if same != label:
                why = "are the same experiment: the keys in which they differ have no effect"
                problems.append(Problem(f"rows '{same}' and '{label}' {why}", key=("rows",)))
            cells += row_cells
    if problems:
        raise ConfigErrors(dict.fromkeys(problems))
    return Comparison(
        name=_part(name) or _part(cells[0].task),
        spec=here,
        profile=first.profile,
        reason=reason,
        cells=tuple(cells),
    )


def _part(name: str) -> str:
    """Return a name, of a file or from the command line, as one part of a path."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:LONGEST]


def _tasks(spec: Spec, first: Config, overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the tasks, each with its changes: those of the specification, unless an override names another."""
    tasks, named = spec.task_list(), first.task.id
    if tasks and not any(key_of(o) == "task.name" for o in overrides):
        return tasks
    return {named: tasks.get(named) or tasks.get(first.task.name) or {}}


def _idle(spec: Spec, overrides: Sequence[str]) -> Iterable[Problem]:
    """Yield a problem for each override without effect on any cell."""
    rows = [set(keys) for _, keys in spec.row_list()]
    for text in overrides:
        key = key_of(text)
        if key == "training.seed" or all(key in row for row in rows):
            instead = "--seeds" if key == "training.seed" else "the rows (of a configuration: --protocols)"
            yield Problem(f"{key} has no effect here: it is set by {instead}", Origin(f"override '{text}'"))


def _seeds(
    spec: Spec, label: str, keys: Mapping[str, Any], overrides: Sequence[str], environment: Environment
) -> Iterable[Cell]:
    """Yield a row's cells; the configuration is checked once, since seeds change nothing about it."""
    settled, _ = resolve(load_config(spec.config, overrides), environment, needs=False)
    path, config = Path(spec.config), spec.config
    if path.is_file() and ROOT in path.resolve().parents:  # by its name, as it comes with the package
        config = path.resolve().relative_to(ROOT).with_suffix("").as_posix()
    for seed in spec.seed_list():
        training = settled.training.model_copy(update={"seed": seed})
        yield Cell(
            task=settled.task.id,
            row=label,
            keys=keys,
            seed=seed,
            config=config,
            overrides=(*overrides, f"training.seed={seed}"),
            settled=settled.model_copy(update={"training": training}),
        )
