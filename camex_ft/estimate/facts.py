"""Facts about public data sets and backbones, for use without files and network: facts.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml

from camex_ft.config.backbones import NEW


def rows(task: str) -> Mapping[str, int] | None:
    """Return the rows that the model reads in each split of a task's public data set; None where it is not known."""
    examples = _load()["rows"].get(task)
    rows_of_an_example = _load()["rows_of_an_example"].get(task, 1)
    if examples is None or rows_of_an_example is None:
        return None
    return {split: count * rows_of_an_example for split, count in examples.items()}


def tokens(task: str) -> Mapping[str, int] | None:
    """Return the tokens of each split under GPT-2's tokenizer; None where they are not known."""
    counts: Mapping[str, int] | None = _load()["tokens"].get(task)
    return counts


def backbone(spec: str) -> dict[str, Any] | None:
    """Return the shape of a backbone of the hub, the entries of its config.json; None where it is not known."""
    entry = _load()["backbones"].get(spec.removeprefix(NEW))
    return None if entry is None else dict(entry["config"])


@lru_cache
def _load() -> dict[str, Any]:
    text = resources.files("camex_ft.estimate").joinpath("facts.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded
