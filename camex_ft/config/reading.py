"""YAML to one document of plain values, with the line of every key: `extends` < the file < overrides.

`extends` is a path or a list of paths, relative to the file that says it, or names of shipped configurations; later
ones win. Mappings are merged key by key, everything else is replaced.

YAML is read by the rules of YAML 1.2's core schema.
PyYAML reads YAML 1.1, where ``2e-4`` is text, ``no`` is false, ``010`` is eight and ``1:30`` is ninety. The resolver
below reads what people mean. Only mappings, lists, text, numbers, true/false and null are known: other tags are
refused, as are keys that occur twice in a mapping and aliases that expand without bound.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from camex_ft.config.problems import Key, Origin, Problem, show
from camex_ft.config.shipped import find_config, suggest

EXTENDS = "extends"
MAX_BYTES = 100_000
MAX_NODES = 10_000
MAX_DEPTH = 20
TAG = "tag:yaml.org,2002:"
RESOLVERS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema's plain scalars."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 -- PyYAML's own class attribute


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads back: quotes exactly the text that would be read as something else."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # To YAML these three are line breaks: unless they are escaped, a space or an ordinary line break comes back.
    style = '"' if any(char in text for char in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(TAG + "str", text, style=style)


Dumper.add_representer(str, _quoted)
for _name, _pattern, _first in RESOLVERS:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(TAG + _name, re.compile(rf"(?:{_pattern})\Z"), list(_first))


@dataclass
class Document:
    """Plain values, where each key was written, and what was wrong on the way.

    Attributes:
        values: nested dicts of plain values; anything plain until the reader has checked.
        origins: dotted key, as a tuple, to its place.
        problems: what could not be read.
    """

    values: Any = field(default_factory=dict)
    origins: dict[Key, Origin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def origin(self, key: Key) -> Origin | None:
        """Return the place of `key`; of an item of a list, that of the list."""
        value = self.values
        for n, part in enumerate(key):
            if not isinstance(value, dict):
                return self.origins.get(key[:n])
            value = value.get(part)
        return self.origins.get(key)


class _Refused(Exception):
    """A node that can't be read; ends the reading of its source."""


def read_file(path: Path) -> Document:
    """Read one YAML file that must hold a mapping. Whatever is wrong is in the document's `problems`."""
    try:
        about = path.stat()
        if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):  # may never end, or never begin
            return _failed("expected a YAML file, and this is a pipe or device", str(path))
        if about.st_size > MAX_BYTES:
            return _failed(f"larger than {MAX_BYTES:,} bytes: this is not a configuration", str(path))
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return _failed("there is no such file.", str(path))
    except IsADirectoryError:
        return _failed("expected a YAML file, and this is a folder", str(path))
    except UnicodeDecodeError as error:
        return _failed(f"not UTF-8 text (byte {error.start}): save it as UTF-8", str(path))
    except (OSError, ValueError) as error:
        return _failed(f"cannot be read: {getattr(error, 'strerror', None) or error}", str(path))
    document = read_text(text, str(path))
    if not document.problems and not isinstance(document.values, dict):
        content = "empty" if document.values is None else f"a {type(document.values).__name__}"
        return _failed(
            f"expected keys and values such as 'task: {{name: sst2}}', and the file is {content}", str(path)
        )
    return document


def read_text(text: str, source: str, *, numbered: bool = True) -> Document:
    """Read YAML `text`; `values` is whatever the text holds, and lines are numbered unless it is an override."""
    builder = _Builder(source, numbered)
    document = builder.document
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            document.values = None if node is None else builder.build(node, (), 0)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        detail = ", ".join(part for part in (error.context, error.problem) if part)
        return _failed(f"not valid YAML: {detail}", source, mark.line + 1 if mark and numbered else 0)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return _failed(f"not valid YAML: {error.reason}", source, line if numbered else 0)
    except RecursionError:
        return _failed(f"nested deeper than {MAX_DEPTH} levels", source)
    except _Refused as error:
        return _failed(*error.args)
    return document


def _failed(message: str, source: str, line: int = 0) -> Document:
    return Document(problems=[Problem(message, Origin(source, line))])


class _Builder:
    """Turns PyYAML's nodes into values, noting lines. Counts nodes as they expand through aliases."""

    def __init__(self, source: str, numbered: bool) -> None:
        self.source = source
        self.numbered = numbered
        self.document = Document()
        self.nodes = 0

    def place(self, node: yaml.Node) -> Origin:
        return Origin(self.source, node.start_mark.line + 1 if self.numbered else 0)

    def refuse(self, node: yaml.Node, message: str) -> _Refused:
        return _Refused(message, self.source, self.place(node).line)

    def build(self, node: yaml.Node, key: Key, depth: int) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.refuse(node, f"more than {MAX_NODES:,} values once its aliases are expanded")
        if depth > MAX_DEPTH:
            raise self.refuse(node, f"nested deeper than {MAX_DEPTH} levels")
        kind = node.tag.removeprefix(TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self.mapping(node, key, depth)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.build(item, (*key, str(n)), depth + 1) for n, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and kind in CONSTRUCT:
            return self.scalar(node, kind)
        raise self.refuse(node, f"the tag {node.tag.replace(TAG, '!!')} is not allowed: plain values only")

    def mapping(self, node: yaml.MappingNode, key: Key, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                raise self.refuse(name_node, "a key must be a name")
            name, place = str(name_node.value), self.place(name_node)
            path = (*key, name)
            if name == "<<" and name_node.style is None:
                self.document.problems.append(Problem("merge keys are not read: use `extends`", place, path))
            elif name in values:
                first = self.document.origins[path]
                message = f"written twice in one mapping, here and on line {first.line}"
                self.document.problems.append(Problem(message, place, path))
            else:
                self.document.origins[path] = place
                values[name] = self.build(value_node, path, depth + 1)
        return values

    def scalar(self, node: yaml.ScalarNode, kind: str) -> Any:
        text = str(node.value)
        try:
            return CONSTRUCT[kind](text)
        except (KeyError, ValueError):
            raise self.refuse(
                node, f"'{text[:40]}' is not what its tag !!{kind} says, or is too long"
            ) from None


def _float(text: str) -> float:
    named = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
    return float(named.get(text.lower(), text))


CONSTRUCT: dict[str, Callable[[str], Any]] = {
    "str": str,
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": int,
    "float": _float,
}


# -- several files and overrides


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
