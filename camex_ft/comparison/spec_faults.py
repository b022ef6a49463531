"""What can be wrong with a specification, each mistake at its line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from camex_ft.comparison.overrides import override
from camex_ft.config.problems import Key, Origin, Problem, expected, show
from camex_ft.config.reading import Document
from camex_ft.errors import nearest
from camex_ft.results.published import experiments

if TYPE_CHECKING:
    from camex_ft.comparison.spec import Changes, Spec

NAME = "name"
ROWS = 1000  # more of them are a mistake
# keys that a specification does not set in its changes -> who does
ELSEWHERE = {
    "profile": "`camex-ft compare`",
    "extends": "the configuration",
    "task.suite": "`tasks`",
    "task.name": "`tasks`",
    "training.seed": "`seeds`",
    "output.dir": "`camex-ft compare`",
}
# what pydantic has several messages about, one for each kind that it might be
KINDS = {
    "tasks": "expected names of tasks, a list, or a mapping of each to changes by key",
    "rows": "expected a list of mappings, such as - merging.protocol: [dense, ties]",
    "seeds": "expected how many, from 1 to 1000, or a list of whole numbers from 0",
}


def refusals(
    found: Iterable[ErrorDetails],
    document: Document,
    file: str,
    models: tuple[type[BaseModel], type[BaseModel]],
) -> list[Problem]:
    """Return what pydantic found, a problem a key; `models` are the specification and its part `embedded`."""
    made: dict[Key, Problem] = {}
    for detail in found:
        key = tuple(str(part) for part in detail["loc"])
        own = key[1:] if key[0] == "embedded" else key
        if detail["type"] == "extra_forbidden":
            known = list(models[own != key].model_fields)
            message = f"unknown key.{nearest(key[-1], known) or ' Expected one of ' + ', '.join(known)}"
        elif detail["type"] == "missing":
            message = "is missing: the configuration that every cell starts from, such as glue"
        elif own and own[0] in KINDS:
            key = key[: len(key) - len(own) + 1]
            message = f"{KINDS[own[0]]}, got {show(_value(document.values, key))}"
        else:
            message = f"{expected(detail)}, got {show(detail['input'])}"
        made.setdefault(key, Problem(message, document.origin(key) or Origin(file), key))
    return list(made.values())


def faults(spec: Spec, document: Document, file: str) -> Iterator[Problem]:
    """Yield what types do not tell: keys in the wrong place, rows without a name of their own, what occurs twice."""
    for above, part in _parts(spec):
        for key, values in _changes(above, part):
            yield from _misplaced(key, values, document)
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
        for what, given in (("rows", labels), ("tasks", part.tasks), ("seeds", part.seeds)):
            twice = _twice(given) if isinstance(given, list) else []
            if twice:
                key = (*above, what)
                yield Problem(f"{twice[0]} occurs twice", document.origin(key), key)
        if labels and spec.baseline not in labels:
            known = f"{nearest(spec.baseline, labels)} Rows: {', '.join(labels)}"
            where = " under embedded" if above else ""
            yield Problem(
                f"there is no row '{spec.baseline}'{where}.{known}",
                document.origins.get(("baseline",)) or Origin(file),
                ("baseline",),
            )
    if spec.published is not None and spec.published not in experiments():
        known = f"{nearest(spec.published, experiments())} Known: {', '.join(experiments())}"
        message = f"no published experiment is called '{spec.published}'.{known}"
        yield Problem(message, document.origin(("published",)), ("published",))


def places(spec: Spec, document: Document) -> dict[str, Origin]:
    """Return where each override that the specification makes is written: by its text, and by its key alone."""
    made: dict[str, Origin] = {}
    for above, part in _parts(spec):
        for place, values in _changes(above, part):
            for key, value in values.items():
                origin = document.origins.get((*place, key))
                for each in value if "rows" in place and isinstance(value, list) else [value]:
                    if origin is not None:
                        made[override(key, each)] = origin
                        made.setdefault(key, origin)
        for task in part.task_list():
            origin = document.origins.get((*above, "tasks", task)) or document.origin((*above, "tasks"))
            if origin is not None:
                made[f"task.name={task.rpartition('/')[2]}"] = origin
    return made


def _parts(spec: Spec) -> list[tuple[Key, Changes]]:
    return [((), spec), (("embedded",), spec.embedded)]


def _changes(above: Key, part: Changes) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    """Yield each mapping of configuration keys to values, with its place."""
    yield (*above, "set"), part.set
    for n, row in enumerate(part.rows or ()):
        yield (*above, "rows", str(n)), row
    for name, changes in part.task_list().items():
        yield (*above, "tasks", name), changes


def _misplaced(place: Key, values: Mapping[str, Any], document: Document) -> Iterator[Problem]:
    for key, value in values.items():
        for leaf in _leaves(key, value):
            if leaf in ELSEWHERE and not (leaf == "profile" and place == ("set",)):
                origin = document.origins.get((*place, key))
                yield Problem(f"{leaf} is not set here: it is given by {ELSEWHERE[leaf]}", origin, place)


def _leaves(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for last, under in value.items():
            yield from _leaves(f"{key}.{last}", under)
    else:
        yield key


def _row(row: Mapping[str, Any], size: int) -> Iterator[tuple[str, str]]:
    """Yield (message, key) of what is wrong with an item of `rows` that stands for `size` of them."""
    name = row.get(NAME)
    if NAME in row and (isinstance(name, (list, dict, bool)) or name is None or name == ""):
        yield f"expected a text, got {show(name)}", NAME
    elif NAME in row and size > 1:
        yield f"the name '{name}' stands for several rows: name those of one value a key, or none", NAME
    if not set(row) - {NAME}:
        yield "a row without values", NAME
    for key, value in row.items():
        if value == [] and key != NAME:
            yield f"{key}: expected a value, or several in a list", key


def _value(values: Any, key: Key) -> Any:
    for part in key:
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _twice(values: Sequence[Any]) -> list[Any]:
    seen: list[Any] = []
    return [value for value in values if value in seen or seen.append(value)]  # type: ignore[func-returns-value]
