"""Published numbers to compare with, from published.yaml: one entry a number, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml

from camex_ft.utils.errors import UserError, nearest

PROFILE = "paper"  # the profile of the published recipe


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published number.

    Attributes:
        value: as printed: in hundredths, a perplexity as it is.
        source: short name, such as "camex".
        cite: the paper.
        read: table or other place from which the number was read.
        setting: known conditions of the measurement.
    """

    value: float
    source: str
    cite: str
    read: str
    setting: str


def experiments() -> tuple[str, ...]:
    """Return the names of the published experiments."""
    return tuple(_load()["experiments"])


def published_numbers(name: str, task: str, row: str) -> tuple[Published, ...]:
    """Return the published numbers of a row, one a source; empty if there are none.

    Args:
        name: of the experiment, one of `experiments`.
        task: its id, such as "glue/sst2".
        row: label of the row: a protocol, or "namex-full-mom".

    Raises:
        UserError: there is no such experiment.
    """
    cells = _experiment(name)["tasks"].get(task, {}).get("rows", {}).get(row, {})
    sources = _load()["sources"]
    return tuple(Published(value=value, source=source, **sources[source]) for source, value in cells.items())


def why_not(name: str, task: str, *, profile: str, backbone: str, metric: str) -> str:
    """Return the reason why runs are not comparable with the published ones, else ""."""
    experiment = _experiment(name)
    if task not in experiment["tasks"]:
        return ""
    expected = experiment["tasks"][task]["metric"]
    backbones = experiment["backbones"]
    if profile != PROFILE:
        return f"they are of profile {PROFILE}, these runs of profile {profile}"
    if backbone not in backbones:
        wanted = " or ".join(backbones[:1]) or "a model of the authors' own, which no backbone here is"
        return f"they are of {wanted}, these runs of {backbone}"
    return "" if metric == expected else f"they are {expected}, these are {metric}"


def _experiment(name: str) -> Mapping[str, Any]:
    known = _load()["experiments"]
    if name not in known:
        raise UserError(
            f"published: no experiment is called '{name}'; there are {', '.join(known)}.{nearest(name, known)}"
        )
    return known[name]


@lru_cache(maxsize=1)
def _load() -> Mapping[str, Any]:
    text = resources.files("camex_ft.results").joinpath("published.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)
