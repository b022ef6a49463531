"""When upcycling changes the function, said with the numbers of the settled configuration."""

from __future__ import annotations

from typing import Any

import pytest

from camex_ft.config import changes, load_config, resolve
from camex_ft.utils.registry import PROTOCOLS


def said(overrides: list[str]) -> list[str]:
    resolved, _ = resolve(load_config("glue", ["profile=embedded", *overrides]))
    return changes(resolved.merging, resolved.routing, resolved.upcycle)


@pytest.mark.parametrize("protocol", PROTOCOLS.names())
def test_defaults_preserve_the_function(protocol: str) -> None:
    assert said([f"merging.protocol={protocol}"]) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["merging.protocol=ep-camex", "merging.alpha=0.5"], "at alpha = 1 alone; with 0.5"),
        (
            ["merging.protocol=smear", "merging.top_k=1", "routing.normalise=before"],
            "the 1 of 4 experts, and smear",
        ),
        (
            ["merging.protocol=namex", "merging.top_k=2", "routing.normalise=before"],
            "the 2 of 4 experts, and namex",
        ),
        (
            ["merging.protocol=ties", "upcycle={init: drop, drop: 0.25}"],
            "draws 25% of each expert's units anew",
        ),
    ],
)
def test_what_changes_it_is_said(overrides: list[str], words: Any) -> None:
    (reason,) = said(overrides)
    assert words in reason and reason.endswith("so that training starts from a changed function")


@pytest.mark.parametrize(
    "overrides",
    [
        ["merging.protocol=domain-ca", "merging.alpha=0.5"],  # a base of its own: tau is 0
        ["merging.protocol=ties", "merging.top_k=1", "routing.normalise=before"],
        ["merging.protocol=dense", "routing.normalise=before", "upcycle.init=drop"],
        ["merging.protocol=smear", "routing.normalise=before"],  # all experts are chosen
        ["merging.protocol=smear", "upcycle={init: drop, drop: 0.0}"],
    ],
)
def test_what_does_not_is_not(overrides: list[str]) -> None:
    assert said(overrides) == []
