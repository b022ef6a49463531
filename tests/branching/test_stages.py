"""Steps of a study: what each one continues, its number of steps, and its validation before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from camex_ft.branching.stages import budget, make_study
from camex_ft.branching.study import read_study
from camex_ft.config import ConfigErrors
from camex_ft.config.shipped import ROOT
from tests.branching.test_study import SPEC
from tests.helpers.machines import machine

MERGED = "  soft: {merging.protocol: smear, training.max_steps: 2}\n"
MORE = MERGED + "  as it begins: {merging.protocol: smear, routing.init: fit, training.max_steps: 0}\n"


def mistakes(planned, text: str, **options: object) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        planned(text, **options)
    return [str(problem) for problem in caught.value.problems]


def test_a_stage_needs_only_runs_of_earlier_stages(planned):
    study = planned(SPEC.replace(MERGED, MORE))
    assert [[step.label for step in stage] for stage in study.stages] == [
        ["start"],
        ["dense", "domain 0", "thrillers"],
        ["soft", "as it begins"],
    ]
    before: set[str] = set()
    for stage in study.stages:
        assert all(set(step.needs) <= before for step in stage)
        before |= {step.label for step in stage}
    assert [step.label for step in study.steps if step.untrained] == ["as it begins"]


def test_a_baseline_gets_the_steps_of_branches_and_tuning(planned):
    study = planned(SPEC.replace(MERGED, MORE))
    dense = next(step for step in study.steps if step.label == "dense")
    assert dense.keys["training.max_steps"] == budget(study.spec) == 2 * 3 + 2
    own = planned(SPEC + "baselines: {dense: {training.max_steps: 5}}\n")
    assert next(s for s in own.steps if s.label == "dense").keys["training.max_steps"] == 5


def test_a_baseline_beside_epochs_needs_its_own_steps(planned):
    text = SPEC.replace("branch: {training.max_steps: 3}", "branch: {training.num_train_epochs: 1}")
    (problem,) = mistakes(planned, text)
    assert problem.startswith("baselines.dense: expected training.max_steps or training.num_train_epochs")


def test_a_step_continues_the_runs_it_needs(planned):
    study = planned(SPEC)
    runs = {(label, 1): Path("results/runs") / label for label in ("start", "domain 0", "thrillers")}
    soft, branch = study.stages[2][0], study.stages[1][1]
    settled = study.cell(soft, 1, runs).settled
    assert settled.backbone == "results/runs/start/model"
    assert settled.upcycle.donors == ("results/runs/domain 0", "results/runs/thrillers")
    assert settled.merging.experts == 2
    assert settled.training.seed == 1
    settled = study.cell(branch, 1, runs).settled
    assert (settled.merging.protocol, settled.data.domain) == ("dense", 0)
    assert settled.backbone == "results/runs/start/model"


def test_without_a_start_the_backbone_is_the_start(planned):
    study = planned(SPEC.replace("start: {training.max_steps: 4}", "start: none"))
    assert [step.label for step in study.stages[0]] == ["dense", "domain 0", "thrillers"]
    assert study.cell(study.stages[0][1], 0, {}).settled.backbone == "embedded/bert"


def test_mistakes_of_all_steps_are_reported_with_their_lines(planned):
    text = SPEC.replace("smear", "smaer").replace("{data.domain: 0}", "{data.domian: 0}")
    first, second = mistakes(planned, text)
    assert first.startswith("spec.yaml:5: data.domian: unknown key. Did you mean 'data.domain'?")
    assert second.startswith("spec.yaml:9: merging.protocol")
    assert "smear" in second


def test_two_steps_that_are_the_same_run_are_refused(planned):
    (problem,) = mistakes(planned, SPEC.replace("data.domain: 1", "data.domain: 0"))
    assert "'domain 0' and 'thrillers' are the same run" in problem


def test_an_override_without_effect_is_refused(planned):
    first, second = mistakes(planned, SPEC, overrides=["training.seed=3", "training.max_steps=3"])
    assert {"no effect" in first, "no effect" in second} == {True, False}
    assert "--seeds" in first + second


@pytest.mark.parametrize("file", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_study_is_valid_and_its_rows_have_as_many_steps(file: Path):
    study = make_study(read_study(file), environment=machine())
    start = study.spec.start["training.max_steps"] if study.spec.start != "none" else 0
    dense = study.stages[1][0]
    assert dense.keys["training.max_steps"] == budget(study.spec) > start
