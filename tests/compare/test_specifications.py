"""Every specification that comes with the package: it reads, and its cells are valid under both profiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from camex_ft.compare.cells import make_comparison
from camex_ft.compare.spec import read_spec
from camex_ft.config import load_config
from camex_ft.config.shipped import ROOT, list_specifications
from tests.helpers.machines import machine

SPECIFICATIONS = list_specifications()


def test_all_files_are_listed():
    assert {each.path.resolve() for each in SPECIFICATIONS} == set((ROOT / "tables").rglob("*.yaml"))
    names = {each.name for each in SPECIFICATIONS}
    assert {
        f"tables/{name}" for name in ("glue", "qa", "wikitext", "alpha", "rank", "dynamic", "experts")
    } <= names


@pytest.mark.parametrize("each", SPECIFICATIONS, ids=lambda each: each.name)
def test_each_has_cells_under_both_profiles(each):
    spec = read_spec(each.path)
    written = load_config(spec.config)
    if written.backbone.startswith("package:"):
        pytest.importorskip(written.backbone[8:].partition("/")[0], reason="needs the weights: make weights")
    for cuda, profile in ((False, "embedded"), (True, "paper")):
        made = make_comparison(spec, environment=machine(cuda=cuda, hub=True))
        assert made.profile == (profile if written.profile == "auto" else written.profile)
        rows, tasks = made.spec.row_list(), made.spec.task_list()
        assert len(made.cells) == len(rows) * max(len(tasks), 1) * len(made.spec.seed_list())
        assert len({c.command for c in made.cells}) == len(made.cells)
        assert made.spec.baseline in {c.row for c in made.cells}


@pytest.mark.parametrize("each", SPECIFICATIONS, ids=lambda each: each.name)
def test_the_header_says_what_it_is_and_how_to_run_it(each):
    first, second = each.path.read_text(encoding="utf-8").splitlines()[:2]
    assert first == f"# {each.summary}"
    words = second.removeprefix("# Run: ").split()
    assert words[:3] == ["camex-ft", "compare", f"configs/{each.name}.yaml"]
    assert make_comparison(
        read_spec(each.path), overrides=words[3:], environment=machine(cuda=False, hub=True)
    ).cells
    assert Path(words[2]).suffix == ".yaml"
