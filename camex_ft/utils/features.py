"""Columns of data sets, declared without `datasets`, which takes a second to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Features


def build_features(columns: Mapping[str, Any]) -> Features:
    """Return the features of columns.

    Args:
        columns: name to type: ``"int32"`` is a value, ``["int32"]`` a list of them, ``("no", "yes")`` a label with
            these names, a mapping a structure. Types of `datasets` stay as they are.
    """
    from datasets import Features

    if isinstance(columns, Features):
        return columns
    return Features({name: _feature(kind) for name, kind in columns.items()})


def _feature(kind: Any) -> Any:
    from datasets import ClassLabel, List, Value

    if isinstance(kind, str):
        return Value(kind)
    if isinstance(kind, list) and len(kind) == 1:
        return List(_feature(kind[0]))
    if isinstance(kind, tuple):
        return ClassLabel(names=list(kind))
    if isinstance(kind, Mapping):
        return {name: _feature(inner) for name, inner in kind.items()}
    return kind
