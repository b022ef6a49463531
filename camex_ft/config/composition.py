"""One document from a file, what it extends, and overrides: `extends` < the file < overrides.

`extends` is a path or a list of paths, relative to the file that says it, or names of shipped configurations; later
ones win. Mappings are merged key by key, everything else is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from camex_ft.config.problems import Key, Origin, Problem, show
from camex_ft.config.reading import Document, read_file, read_text
from camex_ft.config.shipped import find_config, suggest

EXTENDS = "extends"


def compose(path: str | Path, overrides: Iterable[str] = ()) -> Document:
    """Read the configuration at `path` with all that it extends, and apply ``key=value`` overrides."""
    document = _read(find_config(path), ())
    for text in overrides:
        override = read_override(text)
        if document.values:
            document = merge(document, override)
        else:  # the file can't be read: there is nothing to change
            document.problems += override.problems
    return document


def merge(lower: Document, upper: Document) -> Document:
    """Return the union of two documents; where both have a key, `upper` wins, and mappings are merged."""
    origins = {k: v for k, v in lower.origins.items() if not _replaced(k, upper.values)}
    values = _merge_values(lower.values, upper.values)
    return Document(values, {**origins, **upper.origins}, [*lower.problems, *upper.problems])


def read_override(text: str) -> Document:
    """Read ``a.b=value``, the value as YAML, into a document of one key."""
    origin = Origin(f"override '{text}'")
    name, equals, value = text.partition("=")
    key = tuple(part.strip() for part in name.split("."))
    if not equals:
        return Document(problems=[Problem("expected key=value, and there is no '='", origin)])
    if not all(key):
        return Document(problems=[Problem("expected a key such as task.name before '='", origin)])
    if key[0] == EXTENDS:
        return Document(
            problems=[Problem("`extends` is written in files only: name another file to run", origin)]
        )
    inner = read_text(value, origin.source, numbered=False)
    values: Any = inner.values
    for part in reversed(key):
        values = {part: values}
    origins = {(*key, *k): origin for k in inner.origins} | {key[:n]: origin for n in range(1, len(key) + 1)}
    return Document({} if inner.problems else values, {} if inner.problems else origins, inner.problems)


def _read(path: Path, above: tuple[Path, ...], said: Problem | None = None) -> Document:
    """Read `path` with what it extends; `above` are the files that led here, `said` names the line that did."""
    document = read_file(path)
    if document.problems and not path.is_file():
        return _unreadable(path, document, said)
    if not document.values:
        return Document(problems=document.problems)
    base = Document()
    above = (*above, path)
    for name, origin in _extended(document):
        target = find_config(name, beside=path.parent)
        said = Problem("", origin, (EXTENDS,))
        if target.resolve() in (p.resolve() for p in above):
            circle = " -> ".join(str(p) for p in [*above, target])
            base.problems.append(Problem(f"circular: {circle}", origin, (EXTENDS,)))
        else:
            base = merge(base, _read(target, above, said))
    return merge(base, document)


def _unreadable(path: Path, document: Document, said: Problem | None) -> Document:
    """Report a missing file at the line that names it, with the nearest name in its folder or among the shipped."""
    beside = (p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else ()
    message = (
        document.problems[0].message + suggest(path, beside)
        if not path.exists()
        else document.problems[0].message
    )
    if said is None:
        return Document(problems=[Problem(message, Origin(str(path)))])
    return Document(problems=[Problem(f"{path}: {message}", said.origin, said.key)])


def _extended(document: Document) -> list[tuple[str, Origin | None]]:
    """Take `extends` out of the document and return the names in it, each with its place."""
    key = (EXTENDS,)
    if EXTENDS not in document.values:
        return []
    value, origin = document.values.pop(EXTENDS), document.origins.pop(key)
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        message = f"expected a path or a list of paths, got {show(value)}"
        document.problems.append(Problem(message, origin, key))
        return []
    return [(name, origin) for name in names]


def _merge_values(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(lower)
    for name, value in upper.items():
        below = merged.get(name)
        if isinstance(value, dict) and isinstance(below, dict):
            merged[name] = _merge_values(below, value)
        elif value is None and isinstance(below, dict):
            continue  # an empty section, all of whose keys are commented out, changes nothing
        else:
            merged[name] = value
    return merged


def _replaced(key: Key, upper: Mapping[str, Any]) -> bool:
    """Return whether `upper` replaces a mapping around `key`, so that `key` is gone."""
    for part in key:
        if not isinstance(upper, dict) or part not in upper:
            return False
        if not isinstance(upper[part], dict):
            return True
        upper = upper[part]
    return False
