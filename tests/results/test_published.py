"""Published numbers: what is known, under which conditions it is comparable, and that it was copied right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from camex_ft.results.tables import experiments, published_numbers, why_not
from camex_ft.utils import registry
from camex_ft.utils.errors import UserError

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "paper_reference.yaml"
GLUE = "glue-t5-base"
ROWS = {*registry.PROTOCOLS.names(), "namex-full-mom"}


def everything() -> dict[tuple[str, str, str, str], float]:
    """(experiment, task, row, source) -> value, of all tasks and rows that the package knows."""
    tasks = registry.TASKS.names()
    return {
        (name, task, row, one.source): one.value
        for name in experiments()
        for task in tasks
        for row in ROWS
        for one in published_numbers(name, task, row)
    }


def test_numbers_are_those_of_the_reference() -> None:
    if not REFERENCE.exists():
        pytest.skip("the reference with the published numbers is not beside this checkout")
    facts: dict[str, Any] = yaml.safe_load(REFERENCE.read_text(encoding="utf-8"))
    expected = {
        (GLUE, f"glue/{task}", row, source): value
        for source, rows in facts["glue_t5_base"].items()
        for row, values in rows.items()
        for task, value in values.items()
    }
    for source, values in facts["wikitext103_medium_test_perplexity"].items():
        for row, value in values.items():
            expected["wikitext-103-medium", "lm/wikitext-103", row, source] = value
    assert everything() == expected


def test_every_number_says_where_it_is_from() -> None:
    assert len(everything()) > 40
    both = published_numbers(GLUE, "glue/rte", "domain-ca")
    assert [one.source for one in both] == ["camex", "namex"]
    assert all(one.cite and one.read and one.setting for one in both)


def test_what_is_not_known_is_empty() -> None:
    assert published_numbers(GLUE, "glue/qnli", "ties-ca") == ()
    assert published_numbers(GLUE, "glue/sst2", "dense") == ()


def test_unknown_experiment_is_refused() -> None:
    with pytest.raises(UserError, match=r"'glue-t5'.*Did you mean 'glue-t5-base'"):
        published_numbers("glue-t5", "glue/sst2", "smoe")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"task": "glue/qnli", "profile": "embedded"}, ""),
        ({"profile": "embedded"}, "profile paper"),
        ({"backbone": "google/flan-t5-base"}, "google-t5/t5-base"),
        ({"metric": "f1"}, "accuracy"),
    ],
)
def test_only_like_stands_beside_like(changed: dict[str, str], reason: str) -> None:
    setting = {"profile": "paper", "backbone": "google-t5/t5-base", "metric": "accuracy", "task": "glue/sst2"}
    said = why_not(GLUE, **{**setting, **changed})
    assert reason in said and bool(reason) == bool(said)
