"""From a document to a `Config`, with every problem explained: unknown keys, wrong types, impossible combinations."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from camex_ft.config import training_arguments
from camex_ft.config.problems import Key, Problem, expected, show
from camex_ft.config.reading import Document
from camex_ft.config.rules import broken
from camex_ft.config.schema import Config, Section, TaskConfig, TrainingConfig, task_id, task_kind, task_kinds
from camex_ft.utils.errors import nearest

TRAINING: Key = ("training",)


def check(document: Document) -> tuple[Config, list[Problem]]:
    """Return the configuration that `document` says, and its problems; keys with one keep their defaults."""
    problems = list(document.problems)
    values = _without_empty_sections(document.values, Config)
    problems += _check_task(values, document)
    problems += _check_training(values, document)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            key = tuple(str(part) for part in detail["loc"])
            problems.append(Problem(_explain(detail, key), document.origin(key), key))
            _remove(values, key)
        config = Config.model_validate(values)
    refused = [problem.key for problem in problems]
    for keys, message in broken(config):
        if not any(key[: len(bad)] == bad for key in keys for bad in refused if bad):
            problems.append(_located(keys, message, document))
    config._origins = document.origins
    return config, problems


def section_keys(
    model: type[Section] = Config, above: Key = ()
) -> Iterator[tuple[Key, type[Section] | None]]:
    """Yield every key of the schema, with its model where it is a section."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        section = kind if isinstance(kind, type) and issubclass(kind, Section) else None
        name = field.alias or name
        yield (*above, name), section
        if section is not None:
            yield from section_keys(section, (*above, name))
        if section is TaskConfig:
            own = dict.fromkeys(key for kind in task_kinds() for key in kind.model_fields)
            yield from (((*above, name, key), None) for key in own if key not in section.model_fields)


def _located(keys: tuple[Key, ...], message: str, document: Document) -> Problem:
    """Place a broken rule at the first of its keys that was written."""
    key = next((key for key in keys if key in document.origins), keys[0])
    named = message.startswith("merging.")
    if key != keys[0] and not named:
        message = f"{'.'.join(keys[0])}: {message}"
    return Problem(message, document.origin(key), () if named or key != keys[0] else key)


def _check_task(values: dict[str, Any], document: Document) -> Iterator[Problem]:
    """Check keys of `task` that other kinds of task take; take them out.

    At its default such a key is no problem: resolved configurations of earlier versions hold the keys of every kind.
    So it is none under a task that does not exist, which is reported by itself.
    """
    task = values.get("task")
    if not isinstance(task, dict):
        return
    kind = task_kind(task)
    for name in [name for name in task if name not in (kind or TaskConfig).model_fields]:
        others = [other for other in task_kinds() if name in other.model_fields]
        if not others:
            continue
        value, key = task.pop(name), ("task", name)
        if kind is not None and all(value != other.model_fields[name].default for other in others):
            belongs = " or ".join(other.kind for other in others)
            own = ", ".join(own for own in kind.model_fields if own not in TaskConfig.model_fields)
            message = f"an option of {belongs}; {task_id(task)} is a task of {kind.kind}"
            yield Problem(f"{message}, with the options {own}" if own else message, document.origin(key), key)


def _check_training(values: dict[str, Any], document: Document) -> Iterator[Problem]:
    """Check keys of `training` that the schema does not name; take out those that are refused."""
    training = values.get("training")
    if not isinstance(training, dict):
        return
    for name in [name for name in training if name not in TrainingConfig.model_fields]:
        key = (*TRAINING, name)
        message = ""
        if name in training_arguments.OWNED:
            message = f"the toolkit sets this itself: {training_arguments.OWNED[name]}"
        elif name in training_arguments.RENAMED:
            message = f"unknown key. Did you mean 'training.{training_arguments.RENAMED[name]}'?"
        elif not training_arguments.is_field(name):
            message = f"unknown key.{_nearest_key(key)}"
        else:
            try:
                training[name] = training_arguments.coerce(name, training[name])
            except ValueError as error:
                message = f"got {show(training[name])}, {error}"
        if message:
            del training[name]
            yield Problem(message, document.origin(key), key)


def _explain(detail: ErrorDetails, key: Key) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key.{_nearest_key(key)}"
    if kind == "model_type":
        keys = ", ".join(name[-1] for name, _ in section_keys() if name[:-1] == key)
        return f"expected keys below it ({keys}), got {show(value)}"
    if kind == "literal_error":
        words = [word.strip(" '") for word in context["expected"].replace(" or ", ", ").split(",")]
        return f"expected one of {', '.join(words)}, got {show(value)}.{nearest(str(value), words)}"
    quote = "; put it in quotes" if kind == "string_type" and isinstance(value, (int, float)) else ""
    return f"{expected(detail)}, got {show(value)}{quote}"


def _nearest_key(key: Key) -> str:
    """Hint at the key that was meant: the same name elsewhere, else a near name here, else a near name anywhere."""
    known = [name for name, _ in section_keys()]
    if key[:1] == TRAINING:
        known += [
            (*TRAINING, name) for name in training_arguments.fields() if name not in training_arguments.OWNED
        ]
    here = [name for name in dict.fromkeys(known) if name[:-1] == key[:-1]]
    same = [name for name in known if name[-1] == key[-1]]
    for candidates, cutoff in ((same, 0.0), (here, 0.6), (known, 0.7)):
        by_leaf = {name[-1]: name for name in reversed(candidates)}
        near = difflib.get_close_matches(key[-1].lower(), by_leaf, n=1, cutoff=cutoff)
        if near:
            return f" Did you mean '{'.'.join(by_leaf[near[0]])}'?"
    return (
        f" Expected one of {', '.join(name[-1] for name in here[:20])}"
        if here
        else " It takes a value, not keys"
    )


def _without_empty_sections(values: Mapping[str, Any], model: type[Section]) -> dict[str, Any]:
    """Copy `values`; a section with nothing below it, as when all its lines are comments, is left out."""
    sections = {
        key[0]: section for key, section in section_keys(model) if len(key) == 1 and section is not None
    }
    copied: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            copied[name] = _without_empty_sections(value, sections[name]) if name in sections else dict(value)
        elif value is not None or name not in sections:
            copied[name] = value
    return copied


def _remove(values: dict[str, Any], key: Key) -> None:
    """Remove the value at `key`; for an item of a list, the whole list."""
    for part in key[:-1]:
        inner = values.get(part)
        if not isinstance(inner, dict):
            values.pop(part, None)
            return
        values = inner
    values.pop(key[-1], None)
