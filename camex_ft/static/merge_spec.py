"""Specification of a static merge, read from YAML; every mistake is reported with its line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from camex_ft.config.problems import ConfigErrors, Key, Problem, expected, show
from camex_ft.config.reading import Document, compose
from camex_ft.config.rules import misfit
from camex_ft.config.values import Count, Place, Text
from camex_ft.utils.errors import UserError, nearest
from camex_ft.utils.registry import MERGE_METHODS

WEIGHTS = "weights"
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Weight = Annotated[float, Field(allow_inf_nan=False)]
Weights = Annotated[list[Weight], Field(min_length=1)]
STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)
# Keys of several types, for which pydantic has a message each.
KINDS = {
    "from": "expected a list of donors, such as [./law, ./code]",
    WEIGHTS: "expected a number for each donor, or a mapping of name patterns to such lists",
    "config": "expected a configuration or run, or a list with one for each donor",
}
NEEDED = {"start": "the checkpoint that the donors were fine-tuned from", "from": "the donors, a list"}


class MergeTexts(BaseModel):
    """Rows that Fisher information and Gram matrices are computed on.

    Attributes:
        config: configuration or finished run whose train rows are read; a list has one for each donor. Default: each
            donor is a finished run, and its own rows are read.
        set: changes to the configurations, by dotted key.
        rows: number of the first rows of the train split.
    """

    model_config = STRICT

    config: Text | list[Text] | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    rows: Count = 200


class MergeSearch(BaseModel):
    """Search of options and weights on the validation split of a configuration.

    Attributes:
        config: configuration or finished run whose primary metric is measured.
        set: changes to it, by dotted key.
        budget: number of merged models that are measured, the one without a search among them.
        over: option, or ``weights``, -> least and greatest value. Default: the method's own ranges, see
            ``camex-ft ls methods``; `weights` from 0 to 1 where it has none.
        seed: of the first half of the candidates.
    """

    model_config = STRICT

    config: Text
    set: dict[str, Any] = Field(default_factory=dict)
    budget: Annotated[int, Field(ge=2, le=1000)] = 20
    over: dict[str, Annotated[list[Weight], Field(min_length=2, max_length=2)]] | None = None
    seed: Annotated[int, Field(ge=0)] = 0


class MergeSpec(BaseModel):
    """A static merge.

    Attributes:
        start: checkpoint that the donors were fine-tuned from: a backbone's name or a finished run.
        donors: under the key ``from``: backbones' names, finished runs, or ``adapter:PATH``. Relative paths are from
            the working folder.
        method: name of a method, see ``camex-ft ls methods``.
        options: of the method.
        weights: one for each donor, or a mapping of patterns of tensor names to such lists, of which the first that
            matches is used. Default, and for names that none matches: 1.
        head: of the models; default: the head of the start's own configuration, else that of the donors'.
        dtype: of the written weights; default: each tensor's dtype in the start.
        seed: of draws, and of an embedded start's weights; default: that of the donors' runs, else 0.
        data: rows for methods that need them.
        search: of options and weights.
        output: new or empty folder that is written.
    """

    model_config = STRICT

    start: Text
    donors: Annotated[list[Text], Field(min_length=1, alias="from")]
    method: Text = "ties"
    options: dict[str, Any] = Field(default_factory=dict)
    weights: Weights | Annotated[dict[str, Weights], Field(min_length=1)] | None = None
    head: Text | None = None
    dtype: Dtype | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    data: MergeTexts | None = None
    search: MergeSearch | None = None
    output: Place | None = None

    def weights_of(self, name: str) -> Sequence[float]:
        """Return the donors' weights for a tensor."""
        if isinstance(self.weights, dict):
            matching = (w for pattern, w in self.weights.items() if fnmatchcase(name, pattern))
            return next(matching, [1.0] * len(self.donors))
        return self.weights or [1.0] * len(self.donors)

    def changed(self, values: Mapping[str, Any]) -> MergeSpec:
        """Return the specification with other values of options, and of ``weights`` where they are among them."""
        options = {**self.options, **{k: v for k, v in values.items() if k != WEIGHTS}}
        weights = values.get(WEIGHTS, self.weights)
        return self.model_copy(update={"options": options, WEIGHTS: weights})

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Return the patterns of `weights` that match no tensor's name."""
        patterns, names = self.weights if isinstance(self.weights, dict) else (), list(names)
        return [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]


def read_merge_spec(path: str | Path, overrides: Iterable[str] = ()) -> MergeSpec:
    """Return the specification in a file, with ``key=value`` overrides.

    Args:
        path: a YAML file, or the name of a specification of the package, such as ``merge/ties``.
        overrides: as of `config.load_config`.

    Raises:
        ConfigErrors: everything that is wrong with it, with lines.
    """
    document = compose(path, overrides)
    if document.problems:
        raise ConfigErrors(document.problems)
    return make_spec(document.values, document)


def make_spec(values: Mapping[str, Any], document: Document | None = None) -> MergeSpec:
    """Return the specification with these values; `document` has their lines.

    Raises:
        ConfigErrors: everything that is wrong with it.
    """
    document = document or Document(dict(values))
    try:
        spec = MergeSpec.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigErrors(_refusals(error.errors(include_url=False), document)) from None
    problems = [Problem(message, document.origin(key), key) for key, message in faults(spec)]
    if problems:
        raise ConfigErrors(problems)
    return spec


def faults(spec: MergeSpec) -> Iterator[tuple[Key, str]]:
    """Yield mistakes beyond types, each with its key: names, options, and numbers of donors and weights."""
    try:
        entry = MERGE_METHODS.get(spec.method)
    except UserError as error:
        yield ("method",), str(error)
        return
    for name, value in spec.options.items():
        if name in entry.options:
            message = misfit(entry.options[name].annotation, value)
        else:
            known = f"It has: {', '.join(entry.options)}" if entry.options else "It has none"
            message = f"unknown option of '{entry.name}'.{nearest(name, entry.options)} {known}"
        if message:
            yield ("options", name), message
    count = len(spec.donors)
    if entry.count not in (None, count):
        yield ("from",), f"'{entry.name}' merges {entry.count} donors: got {count}"
    lists = spec.weights if isinstance(spec.weights, dict) else {"": spec.weights} if spec.weights else {}
    for pattern, weights in lists.items():
        key = (WEIGHTS, pattern) if pattern else (WEIGHTS,)
        if len(weights) != count:
            yield key, f"expected a number for each of the {count} donors, got {len(weights)}"
        elif not entry.takes(WEIGHTS):
            yield key, f"'{entry.name}' has no weights"
        elif not entry.takes("tau") and sum(weights) <= 0:
            yield key, f"expected a positive sum, by which '{entry.name}' divides, got {sum(weights):g}"
        elif entry.statistic and min(weights) < 0:
            yield key, f"expected 0 or more for '{entry.name}', got {min(weights):g}"
    if entry.statistic and spec.data is None:
        yield (
            ("data",),
            f"'{entry.name}' needs rows of text: data: {{rows: 200}} for donors that are runs, or a config",
        )
    elif spec.data is not None and not entry.statistic:
        yield ("data",), f"'{entry.name}' takes no rows of text: leave data out"
    elif spec.data is not None and isinstance(spec.data.config, list) and len(spec.data.config) != count:
        yield ("data", "config"), f"expected one for each of the {count} donors, got {len(spec.data.config)}"
    elif spec.data is not None and spec.data.config is None and spec.data.set:
        yield ("data", "set"), "changes need data.config: the donors' own runs are read as they are"
    yield from _search_faults(spec, entry)


def _search_faults(spec: MergeSpec, entry: Any) -> Iterator[tuple[Key, str]]:
    if spec.search is None:
        return
    known = [name for name in entry.options if name in entry.ranges]
    known += [WEIGHTS] if entry.takes(WEIGHTS) else []
    for name, (low, high) in (spec.search.over or {}).items():
        key = ("search", "over", name)
        if name not in known:
            yield (
                key,
                f"nothing to search of that name.{nearest(name, known)} Expected one of {', '.join(known)}",
            )
        elif not low < high:
            yield key, f"expected the least value before the greatest, got {low:g} and {high:g}"
        elif name in entry.options:
            for value in (low, high):
                if message := misfit(entry.options[name].annotation, value):
                    yield key, message
    if isinstance(spec.weights, dict) and WEIGHTS in (spec.search.over or {}):
        yield ("search", "over", WEIGHTS), "weights by name are not searched: write a list"


def _refusals(details: Iterable[ErrorDetails], document: Document) -> list[Problem]:
    """Return the errors of pydantic as problems, one a key."""
    sections: dict[str, type[BaseModel]] = {"data": MergeTexts, "search": MergeSearch}
    problems: dict[Key, Problem] = {}
    for detail in details:
        key = tuple(str(part) for part in detail["loc"])
        section = sections.get(key[0], MergeSpec) if len(key) > 1 else MergeSpec
        if detail["type"] == "extra_forbidden":
            names = [field.alias or name for name, field in section.model_fields.items()]
            message = f"unknown key.{nearest(key[-1], names) or ' Expected one of ' + ', '.join(names)}"
        elif detail["type"] == "missing":
            message = f"is missing: expected {NEEDED.get(key[-1], 'a configuration or a run')}"
        else:
            depth = next((n for n, part in enumerate(key) if part in KINDS), None)
            key = key if depth is None else key[: depth + 1]
            said = expected(detail) if depth is None else KINDS[key[-1]]
            message = f"{said}, got {show(_value(document.values, key))}"
        problems.setdefault(key, Problem(message, document.origin(key) or document.origin(key[:-1]), key))
    return list(problems.values())


def _value(values: Any, key: Key) -> Any:
    for part in key:
        values = values.get(part) if isinstance(values, Mapping) else None
    return values
