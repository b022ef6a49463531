"""Check columns of any origin and convert them to the hub's types; errors name the row."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection
from decimal import Decimal
from functools import partial
from typing import Any

from datasets import ClassLabel, Dataset, Features, List, Value

from camex_ft.data.readers import UNREADABLE, Columns, read_json
from camex_ft.tasks.base import WITHHELD, Task
from camex_ft.utils.errors import UserError, nearest

BITS = {"int32": 31, "int64": 63}  # of a whole number beside its sign
MAX_REAL = 3.4e38  # greatest float32, the type of a regression's labels
_NO_LABEL = ("", "nan", "-1", "-1.0")  # a withheld label in the various formats


def to_dataset(columns: Columns, task: Task, split: str, origin: str, *, domain: bool = False) -> Dataset:
    """Return the data set of one split, its columns those of ``task.features``.

    Label names become ids; a missing ``idx`` is numbered; labels may be missing, empty or -1 in test splits only, and
    an ``idx`` may not occur twice there. Other columns are dropped, save ``domain`` where it is asked for.

    Args:
        columns: lists of equal length.
        task: the task whose columns these are.
        split: one of its splits.
        origin: file or hub name, for messages.
        domain: whether to include the column ``domain``.

    Raises:
        UserError: a column is missing, there is no row, or a value is not what its column holds, with its row from 1.
    """
    if not columns or (columns.keys() >= set(task.columns) and not next(iter(columns.values()))):
        raise UserError(f"{origin}: the {split} split of {task.id} is empty; expected at least one row")
    check_columns(columns, task, split, origin)
    rows = len(next(iter(columns.values())))
    test = split in task.splits["test"]
    features = {**task.features, **({"domain": Value("int32")} if domain else {})}
    converted = {}
    for name, feature in features.items():
        if name == "idx" and name not in columns:
            converted[name] = _numbers(feature, rows)
        elif name == "label" and name not in columns:
            converted[name] = [WITHHELD] * rows
        elif name in task.absent and name not in columns:
            converted[name] = [task.absent[name]] * rows
        elif name == "label":
            label = partial(_label, task=task, withheld=test)
            converted[name] = _convert(columns[name], label, origin, name)
        else:
            converted[name] = _convert(columns[name], partial(_typed, feature=feature), origin, name)
    _check_examples(converted, task, origin, answers=not test)
    return Dataset.from_dict(converted, features=Features(features))


def check_columns(columns: Collection[str], task: Task, split: str, origin: str) -> None:
    """Raise `UserError` for a split that lacks a column."""
    needed = list(task.columns)
    if "label" in task.features and split not in task.splits["test"]:
        needed.append("label")
    if split not in task.splits["test"]:
        needed += task.absent
    missing = [name for name in needed if name not in columns]
    if missing:
        hints = "".join(nearest(name, columns) for name in missing[:1]) + _other_separator(columns)
        missing = [f"{name} (or {task.aliases[name]})" if name in task.aliases else name for name in missing]
        raise UserError(
            f"{origin}: {task.id} needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"found {', '.join(columns) or 'none'}.{hints}"
        )


def _other_separator(columns: Collection[str]) -> str:
    """Return a hint for a file whose whole header became the name of one column, or the empty text."""
    delimiter = re.search(r"[,;|\t]", next(iter(columns))) if len(columns) == 1 else None
    if delimiter is None:
        return ""
    return (
        f" The file has one column: its fields seem to be separated by {delimiter[0]!r}, where .csv has commas and "
        ".tsv has tabs"
    )


def _check_examples(columns: Columns, task: Task, origin: str, *, answers: bool) -> None:
    if task.grouped and len({str(idx) for idx in columns["idx"]}) < len(columns["idx"]):
        twice = next(idx for idx, count in Counter(map(str, columns["idx"])).items() if count > 1)
        raise UserError(f"{origin}: idx {twice} occurs twice; rows of {task.id} belong together by their idx")
    unique = task.unique or ("idx" if "idx" in columns and not (answers or task.grouped) else None)
    if unique is not None:  # predictions are told apart by it
        _check_unique(columns[unique], unique, origin)
    names = list(task.features)
    for row, values in enumerate(zip(*(columns[name] for name in names), strict=True), start=1):
        example = dict(zip(names, values, strict=True))
        fault = task.check(example)
        if answers and task.answered and example.get("answers", True) in ([], task.absent.get("answers")):
            fault = fault or "column 'answers' is empty; expected at least one gold answer"
        if fault:
            raise UserError(f"{origin}: row {row}: {fault}")


def _check_unique(values: list[Any], name: str, origin: str) -> None:
    first: dict[Any, int] = {}
    for row, value in enumerate(values, start=1):
        if first.setdefault(value, row) != row:
            raise UserError(
                f"{origin}: row {row}: column '{name}' is {value!r}, as in row {first[value]}; expected a different "
                f"{name} for each row"
            )


def _convert(values: list[Any], convert: Callable[[Any], Any], origin: str, name: str) -> list[Any]:
    """Return a column's values in its type, or raise `UserError` for the first one that does not fit."""
    converted: list[Any] = []
    try:
        for value in values:
            converted.append(convert(value))
    except _Unfit as fault:
        shown = (
            "null" if value is None else repr(value) if len(repr(value)) < 80 else repr(value)[:77] + "..."
        )
        raise UserError(
            f"{origin}: row {len(converted) + 1}: column '{name}' is {shown}; expected {fault}"
        ) from None
    return converted


class _Unfit(Exception):
    """A value that does not fit its column; the message is what was expected."""


def _typed(value: Any, feature: Any) -> Any:
    if isinstance(feature, Value) and feature.dtype == "string":
        if not isinstance(value, str):
            raise _Unfit("a text")
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can write half of a character
            raise _Unfit("a text in Unicode, and it has half of a surrogate pair") from None
        return value
    if isinstance(feature, Value):
        return _whole(value, BITS[feature.dtype])
    if isinstance(value, str):  # csv and tsv files hold lists and objects as JSON
        try:
            value = read_json(value)
        except UNREADABLE:
            raise _Unfit("JSON") from None
    if isinstance(feature, List):
        if not isinstance(value, list):
            raise _Unfit("a list of texts")
        return [_typed(item, feature.feature) for item in value]
    if not isinstance(value, dict) or not set(feature) <= set(value):
        raise _Unfit(f"an object with {', '.join(feature)}")
    return {key: _typed(value[key], feature[key]) for key in feature}


def _number(value: Any) -> Decimal:
    """Return the number that a value is, or that a text spells; a boolean is no number."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str, Decimal)) or "_" in str(value):
            raise _Unfit("a number")
        number = Decimal(value)
    except (ValueError, ArithmeticError):
        raise _Unfit("a number") from None
    if not number.is_finite():
        raise _Unfit("a finite number")
    return number


def _whole(value: Any, bits: int = 63) -> int:
    """Return the whole number that a value is or spells, such as 1, 1.0 and "1"."""
    try:
        number = _number(value)
    except _Unfit:
        raise _Unfit("a whole number") from None
    if not -(2**bits) <= number < 2**bits:  # before anything is done with 1e999999999
        raise _Unfit(f"a whole number that int{bits + 1} holds")
    if number % 1:
        raise _Unfit("a whole number")
    return int(number)


def _label(value: Any, task: Task, *, withheld: bool) -> int | float:
    """Return the class id, or for regression the number; -1 for a label that is withheld, if it may be.

    A class is given by its name or else by its id. The boolean True is the name "True" and no id.
    """
    if withheld and (value is None or str(value) in _NO_LABEL):
        return WITHHELD
    feature = task.features["label"]
    if not isinstance(feature, ClassLabel):
        return _real(value, task.label_range)
    by_name = {name.lower(): number for number, name in enumerate(feature.names)}
    if str(value).lower() in by_name:
        return by_name[str(value).lower()]
    try:
        number = _whole(value)
    except _Unfit:
        number = len(feature.names)
    number = by_name.get(str(number), number)  # 1.0 is the class "1", where one has that name
    if not 0 <= number < len(feature.names):
        known = ", ".join(f"{number} ({name})" for number, name in enumerate(feature.names))
        raise _Unfit(f"{known}, or one of these names")
    return number


def _real(value: Any, limits: tuple[float, float] | None) -> float:
    low, high = limits or (-MAX_REAL, MAX_REAL)
    try:
        number = float(_number(value))
    except _Unfit:
        number = math.nan
    if not low <= number <= high:
        raise _Unfit(f"a number from {low:g} to {high:g}" if limits else "a finite number")
    return number


def _numbers(feature: Any, rows: int) -> list[Any]:
    if isinstance(feature, dict):
        return [dict.fromkeys(feature, row) for row in range(rows)]
    return list(range(rows))
