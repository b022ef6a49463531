"""A study from end to end: an interruption, a branch that fails, the call that goes on, and one with nothing to run."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from camex_ft.branching.execution import run_study
from camex_ft.branching.source_scores import average
from camex_ft.branching.stages import make_study
from camex_ft.branching.study import read_study
from camex_ft.compare.running import DONE, FAILED, WAITING, Runner, request
from camex_ft.compare.worker import perform
from camex_ft.results.entries import read_results
from camex_ft.run.inference import evaluate, load_trained

pytestmark = pytest.mark.slow

SPEC = """
config: glue
set: {profile: embedded, backbone: embedded/bert, data.train_rows: 48, data.eval_rows: 16, merging.curvature.rank: 1}
start: {training.max_steps: 2}
branches:
  - {data.domain: 0}
  - {name: thrillers, data.domain: 1}
branch: {training.max_steps: 2}
merged:
  soft: {merging.protocol: smear, routing.init: fit, routing.fit.rows: 16, training.max_steps: 2}
  as it begins: {merging.protocol: domain-ca, routing.init: fit, routing.fit.rows: 16, training.max_steps: 0}
seeds: 1
"""


class Here(Runner):
    """Runs cells in this process; those of the rows in `broken` fail, and the row `last` is interrupted."""

    broken: frozenset[str] = frozenset()
    last: str = ""
    ran: list[str]

    def run(self, tick=lambda: None) -> None:
        """Run every waiting cell."""
        for state in self.states:
            if state.status == WAITING and state.cell.row == self.last:
                raise KeyboardInterrupt
            if state.status == WAITING:
                self.ran.append(state.cell.row)
                code = 1 if state.cell.row in self.broken else perform(request(state.cell, self.force))
                state.status, state.seconds = (FAILED if code else DONE), 1.0
                state.reason = "no luck today" if code else ""
                self.changed(state)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What four calls ran and said: one is interrupted, a branch fails, it is run again, nothing is missing."""
    folder = tmp_path_factory.mktemp("branch")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["camex-ft"])
        Path("tiny.yaml").write_text(SPEC, encoding="utf-8")
        calls, interrupted = [], []
        study = make_study(read_study("tiny.yaml"), name="tiny")
        with pytest.raises(KeyboardInterrupt):
            run_study(study, runner=type("Runner", (Here,), {"last": "domain 0", "ran": interrupted}))
        for broken in ({"thrillers"}, set(), set()):
            ran: list[str] = []
            runner = type("Runner", (Here,), {"broken": frozenset(broken), "ran": ran})
            failed = run_study(study, runner=runner)
            report = (study.folder / "report.md").read_text(encoding="utf-8")
            calls.append(SimpleNamespace(failed=failed, ran=ran, report=report))
        yield SimpleNamespace(folder=folder, interrupted=interrupted, calls=calls)


def test_an_interrupted_call_goes_on(told):
    assert told.interrupted == ["start", "dense"]
    assert not set(told.interrupted) & set(told.calls[0].ran)


def test_a_failed_branch_stops_what_needs_it_alone(told):
    first = told.calls[0]
    assert first.failed == 2  # the branch, and the merged model that needs it
    assert first.ran == ["domain 0", "thrillers"]
    assert "| domain 0 |" in first.report
    assert "'thrillers', 'soft', 'as it begins'" in first.report


def test_the_next_call_runs_what_is_missing_alone(told):
    second = told.calls[1]
    assert second.failed == 0
    assert second.ran == ["thrillers", "soft"]
    assert second.report.startswith("One seed, so no test: the best other row, ")
    for row in ("start", "own branch", "best branch", "average of branches", "dense", "soft", "as it begins"):
        assert f"| {row} |" in second.report
    assert "as many as 'dense'" not in second.report
    assert "Other steps than 'dense': 'average of branches' 6, 'as it begins' 6." in second.report


def test_when_nothing_is_missing_nothing_is_run(told):
    assert told.calls[2].ran == []
    assert told.calls[2].report == told.calls[1].report


def test_a_score_is_that_of_evaluate(told, monkeypatch):
    monkeypatch.chdir(told.folder)
    (dense,) = [r.record for r in read_results("results") if r.record.cost.steps == 6]
    shown = evaluate(Path("results/runs") / dense.run.name)["validation_accuracy"]
    (line,) = [line for line in told.calls[1].report.splitlines() if line.startswith("| dense | 8 |")]
    assert f"{100 * shown:.1f}" in line.split(" | ")[4]


def test_the_average_is_the_mean_of_the_parameters(told, monkeypatch):
    monkeypatch.chdir(told.folder)
    runs = [Path("results/runs") / r.record.run.name for r in read_results("results")][:2]
    model, _ = average(runs)
    both = [dict(load_trained(run)[0].named_parameters()) for run in runs]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, (both[0][name] + both[1][name]) / 2)


def test_a_records_command_runs_the_step_alone(told):
    (soft,) = [r.record for r in read_results(told.folder / "results") if r.record.protocol == "smear"]
    words = shlex.split(soft.run.command)
    assert words[:3] == ["camex-ft", "run", "glue"]
    assert any(word.startswith("upcycle.from=") for word in words)
