"""Specification of a study of branches, read from YAML; every mistake is reported with its line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails

from camex_ft.compare.spec import NAME, SEEDS, Seeds, Several, override
from camex_ft.config.problems import ConfigErrors, Key, Origin, Problem, expected, show
from camex_ft.config.reading import Document, read_file
from camex_ft.config.shipped import find_config, suggest
from camex_ft.config.values import Text
from camex_ft.results.entries import row_label
from camex_ft.utils.errors import nearest

Overrides = dict[str, Any]
DENSE = "dense"
START, AVERAGE, BEST, OWN, ALL = "start", "average of branches", "best branch", "own branch", "all"
RESERVED = (START, AVERAGE, BEST, OWN, ALL)
UNTRAINED = 0  # training.max_steps of a merged row that is evaluated as it begins
# keys that the steps of a study cannot set -> where they are set
ELSEWHERE = {
    "extends": "the configuration",
    "training.seed": "`seeds`",
    "upcycle.init": "`camex-ft branch`, to checkpoints",
    "upcycle.from": "`camex-ft branch`, to the branches",
}
SHARED = ("profile", "backbone", "output.dir")  # the same in all steps


class StudySpec(BaseModel):
    """A study: branches of one start, trained on their own data, and merged.

    Attributes:
        title: heading of its report.
        about: a sentence or two beneath.
        config: configuration that every step starts from; a name or a path, from the specification's folder.
        set: changes to it, by dotted key, in every step.
        start: changes for the common start, a dense model; ``none``: `backbone` is the start.
        branches: changes for each branch, a dense model that is trained from the start; ``name`` is its label.
        branch: changes for all branches.
        merged: label -> changes, for each model whose experts are the branches. ``training.max_steps: 0`` evaluates it
            as it begins.
        baselines: label -> changes, for models that are trained from the start on all data; the first is the one that
            the others are tested against. Without `training.max_steps` they get the steps of all branches and of the
            longest tuning.
        seeds: how many, counted from 0, or a list.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    title: Text | None = None
    about: Text | None = None
    config: Text
    set: Overrides = Field(default_factory=dict)
    start: Overrides | Literal["none"] = Field(default_factory=dict)
    branches: Annotated[list[Overrides], Field(min_length=2)]
    branch: Overrides = Field(default_factory=dict)
    merged: Annotated[dict[str, Overrides], Field(min_length=1)]
    baselines: Annotated[dict[str, Overrides], Field(min_length=1)] = {DENSE: {}}
    seeds: Several | Seeds = SEEDS
    _places: dict[tuple[Key, str], Origin] = PrivateAttr(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """Labels of the branches."""
        return [
            str(branch.get(NAME) or row_label({k: v for k, v in branch.items() if k != NAME}))
            for branch in self.branches
        ]

    def seed_list(self) -> list[int]:
        """Return the seeds."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)

    def placed(self, problem: Problem, *keys: Key) -> Problem:
        """Return a problem of an override, with its line in the file where it is one of those at `keys` or of `set`."""
        source = problem.origin.source if problem.origin else ""
        text = source.removeprefix("override '").removesuffix("'")
        lines = [self._places[key, text] for key in (*keys, ("set",)) if (key, text) in self._places]
        return Problem(problem.message, lines[0], problem.key) if lines else problem


def read_study(path: str | Path) -> StudySpec:
    """Return the specification in a file.

    Args:
        path: a YAML file, or the name of a specification of the package, such as ``studies/domains``.

    Raises:
        ConfigErrors: everything that is wrong with it, with lines.
    """
    file = find_config(path)
    document = read_file(file)
    if document.problems:
        hint = "" if file.exists() else suggest(path)
        raise ConfigErrors(Problem(p.message + hint, p.origin, p.key) for p in document.problems)
    try:
        spec = StudySpec.model_validate(document.values)
    except ValidationError as error:
        raise ConfigErrors(_refusals(error.errors(include_url=False), document, str(file))) from None
    problems = list(_faults(spec, document))
    if problems:
        raise ConfigErrors(problems)
    for key, values in _changes(spec):
        for name, value in values.items():
            origin = document.origins.get((*key, name))
            if origin is not None:
                spec._places[key, override(name, value)] = origin
    beside = file.parent / spec.config
    return spec.model_copy(update={"config": str(beside)}) if beside.is_file() else spec


def is_study(path: str | Path) -> bool:
    """Return whether a file is the specification of a study, which has the key `branches`."""
    values = read_file(find_config(path)).values
    return isinstance(values, dict) and "branches" in values


def _refusals(details: Iterable[ErrorDetails], document: Document, file: str) -> list[Problem]:
    """Return the errors of pydantic as problems, one a key."""
    problems: dict[Key, Problem] = {}
    known = list(StudySpec.model_fields)
    for detail in details:
        key = tuple(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            message = f"unknown key.{nearest(key[-1], known) or ' Expected one of ' + ', '.join(known)}"
        elif detail["type"] == "missing":
            message = (
                f"is missing: expected {'a configuration, such as glue' if key == ('config',) else 'a value'}"
            )
        elif key[0] == "start":
            key, message = key[:1], f"expected changes by key, or none, got {show(detail['input'])}"
        elif key[0] == "seeds":
            message = f"expected how many, from 1, or a list of whole numbers, got {show(detail['input'])}"
            key = key[:1]
        elif detail["type"] == "too_short":
            message = f"expected at least {detail['ctx']['min_length']}, got {len(detail['input'])}"
        else:
            message = f"{expected(detail)}, got {show(detail['input'])}"
        problems.setdefault(key, Problem(message, document.origin(key) or Origin(file), key))
    return list(problems.values())


def _changes(spec: StudySpec) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    """Yield each mapping of configuration keys to values, with its place."""
    yield ("set",), spec.set
    if spec.start != "none":
        yield ("start",), spec.start
    yield ("branch",), spec.branch
    for n, changes in enumerate(spec.branches):
        yield ("branches", str(n)), changes
    for name, rows in (("merged", spec.merged), ("baselines", spec.baselines)):
        for label, changes in rows.items():
            yield (name, label), changes


def _faults(spec: StudySpec, document: Document) -> Iterator[Problem]:
    """Yield mistakes beyond types: keys in the wrong place, labels that occur twice."""
    for place, values in _changes(spec):
        for key in values:
            origin = document.origins.get((*place, key)) or document.origin(place)
            if place[0] == "branches" and key == NAME:
                continue
            if key in ELSEWHERE:
                yield Problem(f"{key} cannot be set here: it is set by {ELSEWHERE[key]}", origin, place)
            elif place[0] != "set" and key in SHARED:
                yield Problem(f"{key} cannot be set here: it is set by `set`", origin, place)
        if place[0] == "branches" and not set(values) - {NAME}:
            yield Problem(
                "a branch without changes: expected its data, such as data.dir: FOLDER",
                document.origin(place) or document.origin(("branches",)),
                place,
            )
    counts = Counter([*spec.labels, *spec.merged, *spec.baselines, *RESERVED])
    for label in (label for label, count in counts.items() if count > 1):
        rows = (place for place, _ in _changes(spec) if place[0] in ("merged", "baselines"))
        where = next((place for place in rows if place[-1] == label), ("branches",))
        reason = "names a row of every study" if label in RESERVED else "is the label of two rows"
        yield Problem(f"'{label}' {reason}: expected another label", document.origin(where), where)
