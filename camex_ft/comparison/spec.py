"""What a specification of a comparison may say, read from YAML with every mistake placed at its line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from camex_ft.comparison.spec_faults import NAME, faults, places, refusals
from camex_ft.config.problems import ConfigErrors, Origin, Problem
from camex_ft.config.reading import read_file
from camex_ft.config.shipped import find_config, suggest
from camex_ft.config.values import Text
from camex_ft.errors import UserError, nearest
from camex_ft.registry import PROTOCOLS
from camex_ft.results.entries import PROTOCOL, row_label

DENSE = "dense"
SEEDS = 3
MOST = 1000
Several = Annotated[int, Field(ge=1, le=MOST)]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MOST)]
Tasks = (
    Annotated[list[Text], Field(min_length=1)]
    | Annotated[dict[str, dict[str, Any] | None], Field(min_length=1)]
)


class Changes(BaseModel):
    """What a comparison is made of; under a profile, what is different there."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    set: dict[str, Any] = Field(default_factory=dict)
    tasks: Tasks | None = None
    rows: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    seeds: Several | Seeds | None = None

    def task_list(self) -> dict[str, dict[str, Any]]:
        """Return the changes of every task, by its name; none where the configuration's own is meant."""
        if isinstance(self.tasks, dict):
            return {name: changes or {} for name, changes in self.tasks.items()}
        return {name: {} for name in self.tasks or ()}

    def own_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (label, changes by key) of every row that is written here."""
        for item in self.rows or ():
            axes = {k: v if isinstance(v, list) else [v] for k, v in item.items() if k != NAME}
            for values in product(*axes.values()):
                keys = dict(zip(axes, values, strict=True))
                yield str(item.get(NAME) or row_label(keys)), keys


class Spec(Changes):
    """A comparison: configuration `config` with the changes `set`, for each of `tasks`, `rows` and `seeds`.

    Attributes:
        title: heading of its tables.
        about: a sentence or two beneath.
        config: configuration that every cell starts from; a name or a path, from the specification's folder.
        set: changes to it, by dotted key; ``{task}`` in a text stands for the task's name.
        tasks: names of tasks, with their suite where it is another (``superglue/boolq``), or each with changes of its
            own, by dotted key, which win over `set`; default: the configuration's.
        rows: each a mapping of dotted keys to a value, or to a list of values, of which every combination is a row;
            ``name`` is the row's label, else the label is made of the keys. Default: every protocol.
        seeds: how many, counted from 0, or a list.
        baseline: label of the row that the others are tested against.
        published: published experiment whose figures are shown beside ours, of `camex_ft.results.published`.
        embedded: changes under the profile `embedded`; `set` is added to, the others are replaced.
    """

    title: Text | None = None
    about: Text | None = None
    config: Text
    baseline: Text = DENSE
    published: Text | None = None
    embedded: Changes = Field(default_factory=Changes)
    _places: dict[str, Origin] = PrivateAttr(default_factory=dict)

    def under(self, profile: str) -> Spec:
        """Return what it says under a profile."""
        if profile != "embedded":
            return self
        other = self.embedded
        given = {k: getattr(other, k) for k in ("tasks", "rows", "seeds") if getattr(other, k) is not None}
        return self.model_copy(update={"set": {**self.set, **other.set}, **given})

    def seed_list(self) -> list[int]:
        """Return the seeds."""
        seeds = SEEDS if self.seeds is None else self.seeds
        return list(range(seeds)) if isinstance(seeds, int) else list(seeds)

    def row_list(self) -> list[tuple[str, dict[str, Any]]]:
        """Return (label, changes by key) of every row; without rows that of each protocol, the dense model's first."""
        names = sorted(PROTOCOLS.names(), key=lambda name: name != DENSE)
        return list(self.own_rows()) or [(name, {PROTOCOL: name}) for name in names]

    def placed(self, problem: Problem) -> Problem:
        """Return a problem of an override that this specification makes, with the line that it is written in."""
        source = problem.origin.source if problem.origin else ""
        text = source.removeprefix("override '").removesuffix("'")
        place = self._places.get(text, self._places.get(text.partition("=")[0]))
        return Problem(problem.message, place, problem.key) if source != text and place else problem


def read_spec(path: str | Path) -> Spec:
    """Return the specification in a file.

    Args:
        path: a YAML file, or the name of one that comes with the package, such as ``tables/glue``.

    Raises:
        ConfigErrors: everything that is wrong with it, with lines.
    """
    file = find_config(path)
    document = read_file(file)
    problems = [
        Problem(p.message + suggest(path), p.origin, p.key) if not file.exists() else p
        for p in document.problems
    ]
    if problems:
        raise ConfigErrors(problems)
    try:
        spec = Spec.model_validate(document.values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise ConfigErrors(refusals(found, document, str(file), (Spec, Changes))) from None
    problems = list(faults(spec, document, str(file)))
    if problems:
        raise ConfigErrors(problems)
    spec._places = places(spec, document)
    beside = file.parent / spec.config
    return spec.model_copy(update={"config": str(beside)}) if beside.is_file() else spec


def is_spec(path: str | Path) -> bool:
    """Return whether a file is a specification, and not a configuration: it says `config`."""
    values = read_file(find_config(path)).values
    return isinstance(values, dict) and "config" in values


def of_config(path: str | Path, *, protocols: Sequence[str] | None = None) -> Spec:
    """Return the comparison of protocols on a configuration's own task: all of them, unless some are named."""
    unknown = [name for name in protocols or () if name not in PROTOCOLS.names()]
    if unknown:
        known = PROTOCOLS.names()
        raise UserError(
            f"protocols: there is no '{unknown[0]}'.{nearest(unknown[0], known)} Known: {', '.join(known)}"
        )
    twice = [name for n, name in enumerate(protocols or ()) if name in (protocols or ())[:n]]
    if twice:
        raise UserError(f"protocols: '{twice[0]}' occurs twice")
    if not protocols:
        return Spec(config=str(path))
    names = list(protocols)
    return Spec(config=str(path), rows=[{PROTOCOL: names}], baseline=DENSE if DENSE in names else names[0])
