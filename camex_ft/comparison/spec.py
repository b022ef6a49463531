"""What a specification of a comparison may say, read from YAML with every mistake placed at its line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from camex_ft.config.problems import ConfigErrors, Key, Problem, expected, show
from camex_ft.config.reading import Document, read_file
from camex_ft.config.shipped import find_config, suggest
from camex_ft.config.values import Count, Text
from camex_ft.errors import UserError, nearest
from camex_ft.registry import PROTOCOLS
from camex_ft.results.entries import PROTOCOL, row_label

SEEDS = 3
NAME = "name"
ALONE = ("profile", "task.suite", "task.name", "training.seed", "output.dir", "extends")


class Changes(BaseModel):
    """What a comparison is made of; under a profile, what is different there."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    set: dict[str, Any] = Field(default_factory=dict)
    tasks: list[Text] | dict[str, dict[str, Any] | None] | None = None
    rows: list[dict[str, Any]] | None = None
    seeds: Count | list[int] | None = None

    def task_list(self) -> dict[str, dict[str, Any]]:
        """Return the changes of every task, by its name; none where the configuration's own is meant."""
        if isinstance(self.tasks, dict):
            return {name: changes or {} for name, changes in self.tasks.items()}
        return {name: {} for name in self.tasks or ()}


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
    baseline: Text = "dense"
    published: Text | None = None
    embedded: Changes = Field(default_factory=Changes)

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
        """Return (label, changes by key) of every row."""
        every: list[dict[str, Any]] = [{PROTOCOL: list(PROTOCOLS.names())}]
        return [pair for item in (self.rows if self.rows is not None else every) for pair in _rows_of(item)]


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
        raise ConfigErrors(_problem(detail, document) for detail in found) from None
    problems = list(_faults(spec, document))
    if problems:
        raise ConfigErrors(problems)
    beside = file.parent / spec.config
    return spec.model_copy(update={"config": str(beside)}) if beside.is_file() else spec


def is_spec(path: str | Path) -> bool:
    """Return whether a file is a specification, and not a configuration: it says `config`."""
    values = read_file(find_config(path)).values
    return isinstance(values, dict) and "config" in values


def _rows_of(item: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    axes = {k: v if isinstance(v, list) else [v] for k, v in item.items() if k != NAME}
    for values in product(*axes.values()):
        keys = dict(zip(axes, values, strict=True))
        yield str(item.get(NAME) or row_label(keys)), keys


def _faults(spec: Spec, document: Document) -> Iterator[Problem]:
    """Find what types do not tell: keys in the wrong place, a name for several rows, labels and seeds twice."""
    parts: list[tuple[Key, Changes]] = [((), spec), (("embedded",), spec.embedded)]
    for above, part in parts:
        places = [((*above, "set"), part.set)]
        places += [((*above, "rows", str(n)), row) for n, row in enumerate(part.rows or [])]
        places += [((*above, "tasks", name), changes) for name, changes in part.task_list().items()]
        for place, mapping in places:
            for key in mapping:
                if key in ALONE and not (key == "profile" and place == ("set",)):
                    where = (
                        "tasks"
                        if key.startswith("task.")
                        else "seeds"
                        if "seed" in key
                        else "`camex-ft compare`"
                    )
                    yield Problem(
                        f"{key} is not set here: it is given by {where}",
                        document.origins.get((*place, key)),
                        place,
                    )
        for n, row in enumerate(part.rows or []):
            lists = sum(
                isinstance(value, list) and len(value) > 1 for key, value in row.items() if key != NAME
            )
            if NAME in row and lists:
                message = (
                    f"the name '{row[NAME]}' stands for several rows: name those of one value a key, or none"
                )
                yield Problem(message, document.origins.get((*above, "rows", str(n), NAME)), (*above, "rows"))
            if any(value == [] for value in row.values()) or not set(row) - {NAME}:
                yield Problem(
                    "a row without values", document.origins.get((*above, "rows")), (*above, "rows")
                )
        labels = [label for row in part.rows or [] for label, _ in _rows_of(row)]
        for what, values in (("rows", labels), ("tasks", part.tasks), ("seeds", part.seeds)):
            twice = _twice(values) if isinstance(values, list) else []
            if twice:
                yield Problem(
                    f"{twice[0]} occurs twice", document.origins.get((*above, what)), (*above, what)
                )
    for _, some in parts:
        labels = [label for label, _ in some.row_list()] if some is spec else _labels(some)
        if labels and spec.baseline not in labels:
            message = f"there is no row '{spec.baseline}'.{nearest(spec.baseline, labels)} Rows: {', '.join(labels)}"
            yield Problem(message, document.origins.get(("baseline",)), ("baseline",))


def _labels(part: Changes) -> list[str]:
    return [label for row in part.rows or [] for label, _ in _rows_of(row)]


def _twice(values: Sequence[Any]) -> list[Any]:
    return [value for n, value in enumerate(values) if value in values[:n]]


def _problem(detail: ErrorDetails, document: Document) -> Problem:
    key = tuple(str(part) for part in detail["loc"] if part not in ("int", "constrained-int", "list[int]"))
    if detail["type"] == "extra_forbidden":
        known = list((Changes if key[0] == "embedded" else Spec).model_fields)
        message = f"unknown key.{nearest(key[-1], known) or ' Expected one of ' + ', '.join(known)}"
    elif detail["type"] == "missing":
        message = "is missing: the configuration that every cell starts from, such as glue"
    else:
        message = f"{expected(detail)}, got {show(detail['input'])}"
    return Problem(message, document.origins.get(key) or document.origin(key), key)


def of_config(path: str | Path, *, protocols: Sequence[str] | None = None) -> Spec:
    """Return the comparison of protocols on a configuration's own task: all of them, unless some are named."""
    unknown = [name for name in protocols or () if name not in PROTOCOLS.names()]
    if unknown:
        known = PROTOCOLS.names()
        raise UserError(
            f"protocols: there is no '{unknown[0]}'.{nearest(unknown[0], known)} Known: {', '.join(known)}"
        )
    names = list(protocols) if protocols else ["dense", *(n for n in PROTOCOLS.names() if n != "dense")]
    return Spec(
        config=str(path), rows=[{PROTOCOL: names}], baseline="dense" if "dense" in names else names[0]
    )
