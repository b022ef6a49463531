"""Specification of a comparison, read from YAML; every mistake is reported with its line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails

from camex_ft.config.problems import ConfigErrors, Key, Origin, Problem, expected, show
from camex_ft.config.reading import Document, Dumper, read_file
from camex_ft.config.shipped import find_config, suggest
from camex_ft.config.values import Text
from camex_ft.results.entries import PROTOCOL, leaves, row_label
from camex_ft.results.tables import experiments
from camex_ft.utils.errors import UserError, among, nearest
from camex_ft.utils.registry import PROTOCOLS

NAME = "name"
ROWS = 1000  # more of them are a mistake
# keys that a specification cannot set in its changes -> where they are set
ELSEWHERE = {
    "profile": "`camex-ft compare`",
    "extends": "the configuration",
    "task.suite": "`tasks`",
    "task.name": "`tasks`",
    "training.seed": "`seeds`",
    "output.dir": "`camex-ft compare`",
}
# keys of several types, for which pydantic has a message each
KINDS = {
    "tasks": "expected names of tasks, a list, or a mapping of each to changes by key",
    "rows": "expected a list of mappings, such as - merging.protocol: [dense, ties]",
    "seeds": "expected how many, from 1 to 1000, or a list of whole numbers from 0",
}
DENSE = "dense"
SEEDS = 3
MOST = 1000
Several = Annotated[int, Field(ge=1, le=MOST)]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MOST)]
Named = dict[str, dict[str, Any] | None]  # task to its changes
Tasks = Annotated[list[Text], Field(min_length=1)] | Annotated[Named, Field(min_length=1)]
T = TypeVar("T")


def overrides_of(changes: Mapping[str, Any]) -> list[str]:
    """Return changes by dotted key as texts that `load_config` takes."""
    return [override(key, value) for key, value in changes.items()]


def override(key: str, value: Any) -> str:
    """Return ``key=value``, the value in YAML on one line."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True)
    flow = text.removesuffix("\n").removesuffix("\n...")
    return f"{key}={flow}"


def key_of(text: str) -> str:
    """Return the key of an override."""
    return text.partition("=")[0].strip()


class Changes(BaseModel):
    """Tasks, rows and seeds of a comparison; or the changes to them under a profile."""

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
            ``name`` is the row's label, by default formed from the keys. Default: every protocol.
        seeds: how many, counted from 0, or a list.
        baseline: label of the row that the others are tested against.
        published: published experiment whose figures are shown beside ours, of `camex_ft.results.tables`.
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
        """Return the specification under a profile."""
        if profile != "embedded":
            return self
        other = self.embedded
        parts = {key: getattr(other, key) for key in ("tasks", "rows", "seeds")}
        replaced = {key: part for key, part in parts.items() if part is not None}
        return self.model_copy(update={"set": {**self.set, **other.set}, **replaced})

    def seed_list(self) -> list[int]:
        """Return the seeds."""
        seeds = SEEDS if self.seeds is None else self.seeds
        return list(range(seeds)) if isinstance(seeds, int) else list(seeds)

    def row_list(self) -> list[tuple[str, dict[str, Any]]]:
        """Return (label, changes by key) of every row; without rows that of each protocol, the dense model's first."""
        names = sorted(PROTOCOLS.names(), key=lambda name: name != DENSE)
        return list(self.own_rows()) or [(name, {PROTOCOL: name}) for name in names]

    def placed(self, problem: Problem) -> Problem:
        """Return a problem of one of the specification's overrides, with its line in the file."""
        source = problem.origin.source if problem.origin else ""
        text = source.removeprefix("override '").removesuffix("'")
        place = self._places.get(text, self._places.get(text.partition("=")[0]))
        return Problem(problem.message, place, problem.key) if source != text and place else problem


def read_spec(path: str | Path) -> Spec:
    """Return the specification in a YAML file, or one of the package by its name, such as ``tables/glue``.

    Raises:
        ConfigErrors: everything that is wrong with it, with lines.
    """
    file = find_config(path)
    document = read_file(file)
    if document.problems:
        hint = "" if file.exists() else suggest(path)
        raise ConfigErrors(replace(problem, message=problem.message + hint) for problem in document.problems)
    try:
        spec = Spec.model_validate(document.values)
    except ValidationError as error:
        raise ConfigErrors(refusals(error.errors(include_url=False), document, str(file))) from None
    problems = list(faults(spec, document, str(file)))
    if problems:
        raise ConfigErrors(problems)
    spec._places = places(spec, document)
    beside = file.parent / spec.config
    return spec.model_copy(update={"config": str(beside)}) if beside.is_file() else spec


def is_spec(path: str | Path) -> bool:
    """Return whether a file is a specification, which has the key `config`, and not a configuration."""
    values = read_file(find_config(path)).values
    return isinstance(values, dict) and "config" in values


def of_config(path: str | Path, *, protocols: Sequence[str] | None = None) -> Spec:
    """Return the comparison of protocols on a configuration's own task: all of them, unless some are named."""
    names, known = list(protocols or ()), PROTOCOLS.names()
    for name in names:
        if name not in known:
            raise UserError(f"protocols: there is no '{name}'.{among(name, known)}")
    if twice := repeated(names):
        raise UserError(f"protocols: '{twice}' occurs twice")
    if not names:
        return Spec(config=str(path))
    return Spec(config=str(path), rows=[{PROTOCOL: names}], baseline=DENSE if DENSE in names else names[0])


def repeated(items: Sequence[T]) -> T | None:
    """Return the first item that occurs twice."""
    return next((item for n, item in enumerate(items) if item in items[:n]), None)


def refusals(details: Iterable[ErrorDetails], document: Document, file: str) -> list[Problem]:
    """Return the errors of pydantic as problems, one a key."""
    problems: dict[Key, Problem] = {}
    for detail in details:
        key = tuple(str(part) for part in detail["loc"])
        own = key[1:] if key[0] == "embedded" else key
        if detail["type"] == "extra_forbidden":
            known = list((Spec if own == key else Changes).model_fields)
            message = f"unknown key.{nearest(key[-1], known) or ' Expected one of ' + ', '.join(known)}"
        elif detail["type"] == "missing":
            message = "is missing: expected the configuration that every cell starts from, such as glue"
        elif own and own[0] in KINDS:
            key = key[: len(key) - len(own) + 1]
            message = f"{KINDS[own[0]]}, got {show(_value(document.values, key))}"
        else:
            message = f"{expected(detail)}, got {show(detail['input'])}"
        problems.setdefault(key, Problem(message, document.origin(key) or Origin(file), key))
    return list(problems.values())


def faults(spec: Spec, document: Document, file: str) -> Iterator[Problem]:
    """Yield mistakes beyond types: keys in the wrong place, several rows of one name, items that occur twice."""
    for above, part in _parts(spec):
        for key, values in _changes(above, part):
            for name in values:
                for leaf, _ in leaves(values[name], name):
                    if leaf in ELSEWHERE and (leaf, key) != ("profile", ("set",)):
                        message = f"{leaf} cannot be set here: it is set by {ELSEWHERE[leaf]}"
                        yield Problem(message, document.origins.get((*key, name)), key)
        sizes = []
        for n, row in enumerate(part.rows or ()):
            key = (*above, "rows", str(n))
            sizes.append(
                prod(len(value) for k, value in row.items() if k != NAME and isinstance(value, list))
            )
            for message, last in _row(row, sizes[-1]):
                yield Problem(message, document.origins.get((*key, last)) or document.origin(key), key)
        if sum(sizes) > ROWS:
            key = (*above, "rows")
            yield Problem(f"{sum(sizes):,} rows: expected at most {ROWS:,}", document.origin(key), key)
            continue
        labels = [label for label, _ in part.own_rows()]
        lists: dict[str, Any] = {"rows": labels, "tasks": part.tasks, "seeds": part.seeds}
        for name, items in lists.items():
            twice = repeated(items) if isinstance(items, list) else None
            if twice is not None:
                key = (*above, name)
                yield Problem(f"{twice} occurs twice", document.origin(key), key)
        if labels and spec.baseline not in labels:
            message = f"there is no row '{spec.baseline}'{' under embedded' if above else ''}."
            message += f"{nearest(spec.baseline, labels)} Rows: {', '.join(labels)}"
            origin = document.origins.get(("baseline",)) or Origin(file)
            yield Problem(message, origin, ("baseline",))
    if spec.published is not None and spec.published not in experiments():
        message = (
            f"no published experiment is called '{spec.published}'.{among(spec.published, experiments())}"
        )
        yield Problem(message, document.origin(("published",)), ("published",))


def places(spec: Spec, document: Document) -> dict[str, Origin]:
    """Return the line of each override of the specification: by its text, and by its key alone."""
    origins: dict[str, Origin] = {}
    for above, part in _parts(spec):
        for place, values in _changes(above, part):
            for key, value in values.items():
                origin = document.origins.get((*place, key))
                for item in value if "rows" in place and isinstance(value, list) else [value]:
                    if origin is not None:
                        origins[override(key, item)] = origin
                        origins.setdefault(key, origin)
        for task in part.task_list():
            origin = document.origins.get((*above, "tasks", task)) or document.origin((*above, "tasks"))
            if origin is not None:
                origins[f"task.name={task.rpartition('/')[2]}"] = origin
    return origins


def _parts(spec: Spec) -> list[tuple[Key, Changes]]:
    return [((), spec), (("embedded",), spec.embedded)]


def _changes(above: Key, part: Changes) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    """Yield each mapping of configuration keys to values, with its place."""
    yield (*above, "set"), part.set
    for n, row in enumerate(part.rows or ()):
        yield (*above, "rows", str(n)), row
    for name, changes in part.task_list().items():
        yield (*above, "tasks", name), changes


def _row(row: Mapping[str, Any], size: int) -> Iterator[tuple[str, str]]:
    """Yield (message, key) for each mistake in an item of `rows` that stands for `size` rows."""
    name = row.get(NAME)
    if NAME in row and (isinstance(name, (list, dict, bool)) or name is None or name == ""):
        yield f"expected a text, got {show(name)}", NAME
    elif NAME in row and size > 1:
        advice = "name only rows with one value for each key"
        yield f"the name '{name}' would be that of several rows: {advice}", NAME
    if not set(row) - {NAME}:
        yield "a row without values", NAME
    for key, value in row.items():
        if value == [] and key != NAME:
            yield f"{key}: expected a value, or several in a list", key


def _value(values: Any, key: Key) -> Any:
    for part in key:
        values = values.get(part) if isinstance(values, Mapping) else None
    return values
