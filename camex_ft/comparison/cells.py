"""The cells of a comparison: each a configuration, and the command that runs it alone."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from camex_ft.comparison.spec import Spec
from camex_ft.config import Config, ConfigErrors, Environment, Problem, load_config, resolve
from camex_ft.config.reading import Dumper
from camex_ft.config.shipped import ROOT

TASK = "{task}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell.

    Attributes:
        task: its id, such as "glue/sst2".
        row: label of its row.
        keys: what makes the row, by key.
        seed: of the run.
        config, overrides: what `camex-ft run` is told.
        settled: the configuration that this makes, nothing left to `auto`.
    """

    task: str
    row: str
    keys: Mapping[str, Any]
    seed: int
    config: str
    overrides: tuple[str, ...]
    settled: Config = field(repr=False)

    @property
    def command(self) -> str:
        """The command that runs it alone."""
        return shlex.join(["camex-ft", "run", self.config, *self.overrides])

    def __str__(self) -> str:
        return f"{self.task} {self.row} seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A specification with its cells.

    Attributes:
        name: of its folder, such as "glue-sst2".
        spec: as it is under the profile in force.
        profile, reason: which one, and why.
        cells: by task, then row, then seed.
    """

    name: str
    spec: Spec
    profile: str
    reason: str
    cells: tuple[Cell, ...]

    @property
    def title(self) -> str:
        """Its heading."""
        return self.spec.title or f"{', '.join(dict.fromkeys(cell.task for cell in self.cells))}"

    @property
    def output(self) -> Path:
        """The output folder that all of its runs share."""
        return self.cells[0].settled.output.path

    @property
    def folder(self) -> Path:
        """Where its tables, pictures and logs go."""
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
        spec: what to compare.
        name: of the comparison; by default its task's.
        overrides: further ``key=value`` for every cell; they win over what the specification sets, but for its rows.
        seeds: in place of the specification's.
        environment: what the machine has.

    Raises:
        ConfigErrors: all that is wrong with any of the cells.
    """
    environment = environment or Environment()
    written = load_config(spec.config, [*_overrides(spec.set), *overrides])
    first, reason = resolve(written, environment, needs=False)
    here = spec.under(first.profile)
    if seeds is not None:
        here = here.model_copy(update={"seeds": seeds})
    named = any(_key(o) == "task.name" for o in overrides)
    cells: list[Cell] = []
    problems: list[Problem] = []
    tasks = {} if named else here.task_list()
    for task, changes in (tasks or {first.task.id: {}}).items():
        suite, _, last = task.rpartition("/")
        own = [o.replace(TASK, last) for o in [*_overrides({**here.set, **changes}), *overrides]]
        own = [*(o for o in own if _key(o) != "profile"), f"profile={first.profile}"]
        own += [*([f"task.suite={suite}"] if suite else []), f"task.name={last}"]
        own = list({_key(o): o for o in own}.values())  # the last of a key wins
        for label, keys in here.row_list():
            try:
                cells += _seeds(here, label, keys, [*own, *_overrides(keys)], environment)
            except ConfigErrors as errors:
                problems += errors.problems
    if problems:
        raise ConfigErrors(dict.fromkeys(problems))
    return Comparison(
        name=name or cells[0].task.replace("/", "-"),
        spec=here,
        profile=first.profile,
        reason=reason,
        cells=tuple(cells),
    )


def _seeds(
    spec: Spec, label: str, keys: Mapping[str, Any], overrides: Sequence[str], environment: Environment
) -> Iterable[Cell]:
    """Yield a row's cells; the configuration is checked once, since seeds change nothing about it."""
    settled, _ = resolve(load_config(spec.config, overrides), environment, needs=False)
    for seed in spec.seed_list():
        yield Cell(
            task=settled.task.id,
            row=label,
            keys=keys,
            seed=seed,
            config=_named(spec.config),
            overrides=(*overrides, f"training.seed={seed}"),
            settled=settled.model_copy(
                update={"training": settled.training.model_copy(update={"seed": seed})}
            ),
        )


def _overrides(changes: Mapping[str, Any]) -> list[str]:
    return [f"{key}={_flow(value)}" for key, value in changes.items()]


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _named(config: str) -> str:
    """Return the name of a configuration that comes with the package, or its path as it is."""
    path = Path(config)
    inside = path.is_file() and ROOT in path.resolve().parents
    return path.resolve().relative_to(ROOT).with_suffix("").as_posix() if inside else config
