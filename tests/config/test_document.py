"""docs/configuration.md is what the schema says today, and the schema says something about every key."""

from __future__ import annotations

from pathlib import Path

import pytest

from camex_ft.config import load_config
from camex_ft.config.document import HEAD, document
from camex_ft.config.schema import TaskConfig, task_kinds
from camex_ft.config.training_arguments import OWNED, RENAMED, fields
from camex_ft.config.validation import section_keys

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_page_is_fresh():
    stale = "run: python -m camex_ft.config.document > docs/configuration.md"
    assert PAGE.read_text(encoding="utf-8") == document(), stale


@pytest.mark.parametrize("key", [".".join(key) for key, section in section_keys() if section is None])
def test_every_key_has_a_row_with_type_default_and_meaning(key):
    tables = document().partition("## Top level")[2].splitlines()
    rows = [line for line in tables if line.startswith(f"| `{key}` |")]
    assert len(rows) == 1 or key in ("task.max_length",)  # one for each kind of task that takes it
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 4
        assert all(cells)
        assert cells[3].endswith(".")


def test_every_kind_of_task_has_a_table_of_its_options():
    page = document()
    for kind in task_kinds():
        table = page.partition(f"### Tasks of {kind.kind}\n")[2].partition("\n#")[0]
        shown = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
        assert shown == [f"task.{key}" for key in kind.model_fields if key not in TaskConfig.model_fields]


def test_the_page_shows_what_the_profiles_set():
    plain, *suites = document().partition("## Profiles")[2].partition("## Top level")[0].split("Suite ")
    assert "| `merging.experts` | `7` | `4` |" in plain and "`task.block_size`" not in plain
    (lm,) = [table for table in suites if table.startswith("`lm`:")]
    assert "| `routing.segment` | `256` | `32` |" in lm


def test_the_example_on_the_page_is_valid(write):
    config = load_config(write(HEAD.split("```yaml\n")[1].split("```")[0]))
    assert config.merging.options == {"density": 0.5}
    assert config.training.arguments()["warmup_steps"] == 0.1


def test_keys_that_are_refused_or_renamed_are_real():
    """A new release of transformers may drop or rename fields."""
    assert set(OWNED) <= set(fields())
    assert set(RENAMED.values()) <= set(fields())
    assert not set(RENAMED) & set(fields())
