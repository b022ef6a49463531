"""Specifications of studies: every mistake is reported with its line and the nearest name."""

from __future__ import annotations

import pytest

from camex_ft.branching.study import is_study, read_study
from camex_ft.config import ConfigErrors

SPEC = """config: glue
set: {backbone: embedded/bert}
start: {training.max_steps: 4}
branches:
  - {data.domain: 0}
  - {name: thrillers, data.domain: 1}
branch: {training.max_steps: 3}
merged:
  soft: {merging.protocol: smear, training.max_steps: 2}
seeds: 2
"""


def mistakes(write, text: str) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        read_study(write(text))
    return [str(problem) for problem in caught.value.problems]


def test_a_specification_is_read(write):
    spec = read_study(write(SPEC))
    assert spec.labels == ["domain 0", "thrillers"]
    assert spec.seed_list() == [0, 1]
    assert spec.baselines == {"dense": {}}
    assert is_study("spec.yaml")
    assert read_study(write(SPEC.replace("{training.max_steps: 4}", "none"))).start == "none"


@pytest.mark.parametrize(
    ("change", "place", "words"),
    [
        (("branch:", "brunch:"), "spec.yaml:7: brunch", "unknown key. Did you mean 'branch'?"),
        (("config: glue\n", ""), "spec.yaml: config", "expected a configuration, such as glue"),
        (("{training.max_steps: 4}", "soon"), "spec.yaml:3: start", "expected changes by key, or none, got"),
        (("seeds: 2", "seeds: two"), "spec.yaml:10: seeds", "expected how many, from 1, or a list"),
        (
            ("  - {name: thrillers, data.domain: 1}\n", ""),
            "spec.yaml:4: branches",
            "expected at least 2, got 1",
        ),
        (
            ("branch: {", "branch: {training.seed: 1, "),
            "spec.yaml:7: branch",
            "training.seed cannot be set here: it is set by `seeds`",
        ),
        (("soft: {", "soft: {backbone: embedded/t5, "), "spec.yaml:9: merged.soft", "it is set by `set`"),
        (("soft: {", "soft: {upcycle.from: [a, b], "), "spec.yaml:9: merged.soft", "`camex-ft branch`"),
        (
            ("{name: thrillers, data.domain: 1}", "{name: thrillers}"),
            "spec.yaml:4: branches.1",
            "a branch without changes",
        ),
        (("soft:", "dense:"), "spec.yaml:9: merged.dense", "'dense' is the label of two rows"),
        (("name: thrillers", "name: start"), "spec.yaml:4: branches", "'start' names a row of every study"),
    ],
)
def test_a_mistake_is_reported_with_its_line(write, change, place, words):
    (problem,) = mistakes(write, SPEC.replace(*change))
    assert problem.startswith(place)
    assert words in problem


def test_a_missing_file_gets_the_nearest_name():
    with pytest.raises(ConfigErrors, match="Did you mean 'studies/domains'"):
        read_study("studies/domain")
