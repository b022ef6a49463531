"""`camex-ft compare` and `camex-ft table` from end to end: two protocols, one seed, tiny data."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from camex_ft import cli
from camex_ft.cli import compare
from camex_ft.compare import grid, running, slurm
from camex_ft.compare.running import Runner
from camex_ft.config import config_hash, load_config, resolve
from camex_ft.results.entries import read_results
from camex_ft.results.render import FORMATS
from camex_ft.utils.errors import UserError

SPEC = """
title: Tiny
about: Two rows.
config: glue
set: {backbone: embedded/bert, data.train_rows: 32, data.eval_rows: 16, training.max_steps: 2, merging.experts: 2}
tasks: [sst2]
rows:
  - merging.protocol: dense
  - {name: "κ/ä, [x] 'smear'", merging.protocol: smear}
seeds: 1
"""
MORE = SPEC.replace("tasks: [sst2]", "tasks: {sst2: , rte: {data.dir: nowhere}}")
# a worker that fails for one protocol
PICKY = """
import io, sys
line = sys.stdin.readline()
if "smear" in line:
    sys.exit("error: no luck today")
sys.stdin = io.StringIO(line)
from camex_ft.compare.worker import main
sys.exit(main())
"""
NEVER = "import sys; sys.exit('error: nothing was to be run')"


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What four calls said: one cell fails, it is run again, nothing is missing, another task has no data."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        Path("tiny.yaml").write_text(SPEC, encoding="utf-8")
        Path("more.yaml").write_text(MORE, encoding="utf-8")
        calls = []
        for spec, code in (("tiny", PICKY), ("tiny", None), ("tiny", NEVER), ("more", NEVER)):
            command = running.COMMAND if code is None else (sys.executable, "-c", code)
            with patch.context() as inner:
                inner.setattr(running, "COMMAND", command)
                calls.append(invoke("compare", f"{spec}.yaml", "--jobs", "1"))
            calls[-1].runs = {
                path.name: path.stat().st_mtime_ns for path in folder.glob("results/runs/*/record.json")
            }
            calls[-1].files = {path.name for path in (folder / "results/comparisons" / spec).iterdir()}
        failed, mended, again, more = calls
        return SimpleNamespace(folder=folder, failed=failed, mended=mended, again=again, more=more)


def test_a_cell_that_fails_does_not_stop_the_others(told):
    shown = told.failed.output
    assert told.failed.exit_code == 1
    assert "2 waiting" in shown
    assert "[1/2] glue/sst2 dense seed 0: done in " in shown
    assert (
        "[2/2] glue/sst2 κ/ä, [x] 'smear' seed 0: failed: no luck today (see results/comparisons/logs/"
        in shown
    )
    assert shown.splitlines()[-1] == "failed: glue/sst2 κ/ä, [x] 'smear' seed 0: no luck today"
    assert {"table.md", "table.csv", "table.tex"} <= told.failed.files
    assert "wrote results/report.html" in shown


def test_the_next_call_runs_what_is_missing_alone(told):
    assert told.mended.exit_code == 0
    assert "1 done, 1 waiting" in told.mended.output
    assert "dense seed 0: " not in told.mended.output
    assert "[2/2] glue/sst2 κ/ä, [x] 'smear' seed 0: done in " in told.mended.output


def test_when_nothing_is_missing_nothing_is_run(told):
    assert told.again.exit_code == 0, told.again.output
    assert "2 done" in told.again.output
    assert "running" not in told.again.output
    assert told.again.runs == told.mended.runs


def test_tables_and_pictures_are_written(told):
    assert {"table.md", "table.csv", "table.tex", "comparison.png"} <= told.mended.files
    assert all(name.isascii() and " " not in name for name in told.mended.files)
    page = (told.folder / "results" / "report.html").read_text(encoding="utf-8")
    assert "κ/ä, [x] &#x27;smear&#x27;" in page or "κ/ä, [x] 'smear'" in page


def test_a_cells_record_says_the_command_that_runs_it_alone(told):
    (dense,) = [r.record for r in read_results(told.folder / "results") if r.record.protocol == "dense"]
    program, subcommand, config, *overrides = shlex.split(dense.run.command)
    assert (program, subcommand) == ("camex-ft", "run")
    settled, _ = resolve(load_config(config, overrides), needs=False)
    assert dense.run.name.endswith(config_hash(settled, data=dense.data.sha256))


def test_a_task_without_data_does_not_stop_the_others(told):
    shown = told.more.output
    assert told.more.exit_code == 1
    assert "2 done, 2 failed" in shown
    assert "[4/4] glue/rte dense seed 0: failed: " in shown  # before anything runs
    assert shown.count("failed: glue/rte ") == 2  # and at the end
    assert "there is no folder 'nowhere'" in shown
    assert "glue/sst2" in (told.folder / "results/comparisons/more/table.md").read_text(encoding="utf-8")
    assert told.more.runs == told.again.runs


@pytest.mark.parametrize("format", FORMATS)
def test_the_table_can_be_had_in_every_format(told, monkeypatch, format):
    monkeypatch.chdir(told.folder)
    shown = invoke("table", "tiny.yaml", "--format", format)
    assert shown.exit_code == 0
    assert "dense" in shown.output and "sst2" in shown.output
    assert invoke("table", "tiny.yaml", "--format", format, "--records", "results").output == shown.output
    assert invoke("table", "tiny.yaml", "--format", format, "--out", "t").output == "wrote t\n"
    assert Path("t").read_text(encoding="utf-8") == shown.output


@pytest.mark.parametrize("option", ["--records", "--protocols", "--seeds", "--keep"])
def test_options_of_specifications_are_refused_for_a_folder(tmp_path, option):
    error = invoke("table", str(tmp_path), option, "3").exception
    assert isinstance(error, UserError) and option in str(error)


def test_the_table_of_what_has_not_been_run(told, monkeypatch):
    monkeypatch.chdir(told.folder)
    error = invoke("table", "tiny.yaml", "--seeds", "7,").exception
    assert isinstance(error, UserError)
    assert str(error) == "tiny: none of its 2 cells has been run yet: run them with camex-ft compare"


def test_a_dry_run_knows_what_is_done_and_runs_nothing(told, monkeypatch):
    monkeypatch.chdir(told.folder)
    monkeypatch.setattr(running, "COMMAND", (sys.executable, "-c", NEVER))
    shown = invoke("compare", "tiny.yaml", "--seeds", "2", "--dry-run")
    assert shown.exit_code == 0
    assert "4 cells, 2 of them missing" in shown.output
    assert len(read_results("results")) == 2


def test_force_runs_again_what_is_done(told, monkeypatch):
    monkeypatch.chdir(told.folder)
    monkeypatch.setattr(running, "COMMAND", (sys.executable, "-c", "import sys; sys.exit('error: forced')"))
    shown = invoke("compare", "tiny.yaml", "--force", "--jobs", "2")
    assert shown.exit_code == 1
    assert shown.output.count("failed: forced (see ") == 2
    assert len(read_results("results")) == 2  # the old ones stay until new ones begin


def test_an_interruption_has_its_own_exit_code(folder, write, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm, "run", interrupt)
    left = invoke("compare", str(write(SPEC)))
    assert left.exit_code == compare.INTERRUPTED == 130
    assert "The same command runs the missing cells." in left.output


def test_comparisons_with_different_output_folders_are_refused(folder, write):
    write("output: {dir: there}", "base.yaml")
    write(SPEC, "one.yaml")
    write(SPEC.replace("config: glue", "config: base.yaml"), "two.yaml")
    error = invoke("compare", "one.yaml", "two.yaml").exception
    assert isinstance(error, UserError)
    assert "these comparisons have several: results, there" in str(error)


def test_a_place_that_can_not_be_written_is_found_before_anything_runs(folder, write):
    Path("taken").write_text("a file")
    error = invoke("compare", str(write(SPEC)), "output.dir=taken/x").exception
    assert isinstance(error, UserError)
    assert "output.dir" in str(error) and "taken" in str(error)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_is_read_only_is_found_before_anything_runs(folder, write):
    Path("results").mkdir(mode=0o555)
    error = invoke("compare", str(write(SPEC))).exception
    assert isinstance(error, UserError)
    assert "output.dir" in str(error)


ARGUMENTS = {
    (): "no comparison is named: expected a specification such as tables/glue",
    ("task.name=rte",): "no comparison is named",
    (
        "spec.yaml",
        "--protocols",
        "dense",
    ): "--protocols is for configurations, and spec.yaml is a specification",
    ("spec.yaml", "spec.yaml"): "another comparison before it is called 'spec' too",
    ("spec.yaml", "--seeds", "0"): "--seeds: expected a number from 1 to 1,000",
    (
        "spec.yaml",
        "--seeds",
        "a b",
    ): "--seeds: expected a number of seeds, such as 3, or the seeds, such as '0 1 2', got 'a'",
    ("spec.yaml", "--seeds", "-1"): "got '-1'",
    ("spec.yaml", "--seeds", "²"): "got '²'",
    ("spec.yaml", "--seeds", "1 2 1"): "--seeds: 1 occurs twice",
    ("glue", "--protocols", "dense, tise"): "there is no 'tise'. Did you mean 'ties'?",
    ("spec.yaml", "merging.protocol=ties"): "merging.protocol has no effect here",
    ("nothing.yaml",): "nothing.yaml: there is no such file",
}


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=" ".join)
def test_what_is_typed_wrong_is_said(write, arguments):
    write(SPEC)
    for command in ("compare", "table"):
        error = invoke(command, *arguments).exception
        if arguments in ((), ("task.name=rte",)) and error is not None and not isinstance(error, UserError):
            continue  # typer's own
        assert isinstance(error, UserError), error
        assert ARGUMENTS[arguments] in str(error)


def test_a_comparison_of_one_task_of_several_has_a_folder_of_its_own(folder, write):
    """Its tables do not replace those of the whole."""
    write(SPEC)
    [whole] = compare._comparisons(["spec.yaml"], "", "")
    [one] = compare._comparisons(["spec.yaml", "task.name=rte"], "", "")
    assert (whole.name, one.name) == ("spec", "spec-rte")


def test_a_runner_is_closed_whatever_happens(folder, write, monkeypatch):
    """An exception in what is shown must not leave processes."""
    closed = []
    monkeypatch.setattr(Runner, "close", lambda self: closed.append(self))
    monkeypatch.setattr(running, "COMMAND", (sys.executable, "-c", NEVER))
    monkeypatch.setattr(Runner, "_look_after", lambda self, slot: 1 / 0)
    write(SPEC)
    [comparison] = compare._comparisons(["spec.yaml"], "", "")
    with pytest.raises(ZeroDivisionError):
        grid.run_grid([comparison], jobs=1)
    assert len(closed) == 1
