"""Cells as jobs: what is submitted, what is asked for, and that jobs give what processes give."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from camex_ft import cli
from camex_ft.compare import slurm
from camex_ft.compare.slurm import PARAMETERS, SUBMITTED, convert, read
from camex_ft.compare.worker import Job
from camex_ft.results.entries import read_results
from camex_ft.utils.errors import UserError

TINY = """
title: Tiny
config: glue
set: {backbone: embedded/bert, data.train_rows: 32, data.eval_rows: 16, training.max_steps: 2, merging.experts: 2}
tasks: [sst2]
rows: [{merging.protocol: [dense, smear, ties-ca]}]
seeds: 1
"""
SBATCH = """#!/bin/sh
[ -n "$REFUSE" ] && { echo "sbatch: error: invalid partition specified" >&2; exit 1; }
cp "$1" "$CLUSTER/script"
echo "Submitted batch job 4711"
"""
SQUEUE = """#!/bin/sh
[ -n "$SILENT" ] && exit 1
echo "$@" >> "$CLUSTER/asked"
cat "$CLUSTER/queue"
"""


@pytest.fixture
def cluster(folder, write, monkeypatch) -> Path:
    """A folder with the programs of a cluster that runs nothing; they are on PATH."""
    pytest.importorskip("submitit", reason="needs submitit")
    made = folder / "cluster"
    made.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("srun", "#!/bin/sh\n")):
        (made / name).write_text(text)
        (made / name).chmod(0o755)
    (made / "queue").write_text("")
    monkeypatch.setenv("PATH", str(made), prepend=":")
    monkeypatch.setenv("CLUSTER", str(made))
    monkeypatch.setattr("camex_ft.utils.system.hub_answers", lambda: False)
    write(TINY, "tiny.yaml")
    return made


def compare(*arguments: str):
    return CliRunner().invoke(cli.app, ["compare", "tiny.yaml", *arguments])


def asked(cluster: Path) -> dict[str, str]:
    """What the submitted script asks for."""
    return dict(
        re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", (cluster / "script").read_text(), flags=re.MULTILINE)
    )


def test_an_array_has_a_job_for_each_missing_cell(cluster):
    shown = compare("--on", "slurm", "--slurm", "partition=gpu a", "--slurm", "mem_gb=16.5", "--jobs", "2")
    assert shown.exit_code == 0, shown.output
    said = asked(cluster)
    assert said["array"] == "0-2%2"
    assert {k: said[k] for k in ("partition", "mem", "gpus-per-node", "cpus-per-task", "time", "nodes")} == {
        "partition": "'gpu a'",
        "mem": "16896MB",
        "gpus-per-node": "1",
        "cpus-per-task": "4",
        "time": "1440",
        "nodes": "1",
    }
    assert "submitted as job 4711, cells: 3; logs: " in shown.output
    assert "camex-ft table SPEC profile=embedded" in shown.output
    jobs = Path("results/comparisons/jobs").absolute()
    assert said["output"] == f"{jobs}/%A_%a_0_log.out"
    assert len(list(jobs.glob("4711_*_submitted.pkl"))) == 3
    assert not Path("results/runs").exists()


def test_what_is_in_the_queue_is_not_submitted_again(cluster, monkeypatch):
    assert compare("--on", "slurm").exit_code == 0
    known = json.loads(Path("results/comparisons/jobs", SUBMITTED).read_text())
    assert sorted(known.values()) == ["4711_0", "4711_1", "4711_2"]
    (cluster / "queue").write_text("4711_0\n4711_2\n99\n")
    (cluster / "script").unlink()
    shown = compare("--on", "slurm", "--slurm", "setup=module load cuda && ulimit -n 4096")
    assert "submitted as job 4711, cells: 1" in shown.output
    assert "in the queue already: 2" in shown.output
    assert "\nmodule load cuda && ulimit -n 4096\n" in (cluster / "script").read_text()
    assert "array" not in asked(cluster)  # submitit's way to submit one
    (cluster / "queue").write_text("4711\n4711_0\n4711_2\n")
    (cluster / "script").unlink()
    shown = compare("--on", "slurm")
    assert "in the queue already: 3" in shown.output
    assert not (cluster / "script").exists()
    monkeypatch.setenv("SILENT", "1")
    assert "so the queue is not known" in compare("--on", "slurm").output


def test_a_cluster_that_refuses_and_a_machine_without_one(cluster, monkeypatch):
    monkeypatch.setenv("REFUSE", "1")
    error = compare("--on", "slurm").exception
    assert isinstance(error, UserError)
    assert "--on slurm: sbatch refused the jobs: " in str(error) and "invalid partition specified" in str(
        error
    )
    assert not Path("results/comparisons/jobs", SUBMITTED).exists()
    (cluster / "sbatch").unlink()
    assert "sbatch is not installed here" in str(compare("--on", "slurm").exception)


def test_without_submitit_it_says_how_to_get_it(cluster, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "pip install 'submitit>=1.5'" in str(compare("--on", "slurm").exception)


def test_jobs_have_a_gpu_wherever_they_are_submitted_from():
    assert slurm.environment("here", {}) is None
    assert slurm.environment("local-jobs", {}) is None
    for given, gpu in (({}, True), ({"gpus_per_node": "0"}, False), ({"gres": "gpu:a100:1"}, True)):
        made = slurm.environment("slurm", given)
        assert made is not None and made.cuda() is gpu
    assert "gpus_per_node" not in convert({"gres": "gpu:1"})
    assert "gpus_per_node" not in convert({"gpus_per_node": "0"})


MISTAKES = {
    ("slurm", "partitio=gpu"): "--slurm: there is no 'partitio'. Did you mean 'partition'? Known: account, ",
    ("slurm", "partition"): "--slurm: partition has no value; expected partition=VALUE, once",
    ("slurm", "partition="): "--slurm: partition: expected a text on one line, got ''",
    ("slurm", "time=1:00"): "--slurm: time: expected minutes, a whole number from 1, got '1:00'",
    ("slurm", "time=0"): "--slurm: time: expected minutes, a whole number from 1, got '0'",
    ("slurm", "mem_gb=lots"): "--slurm: mem_gb: expected a number of gigabytes, got 'lots'",
    ("slurm", "mem_gb=nan"): "--slurm: mem_gb: expected a number of gigabytes, got 'nan'",
    ("slurm", "mem_gb=-1"): "--slurm: mem_gb: expected a number of gigabytes, got '-1'",
    ("slurm", "cpus_per_task=²"): "--slurm: cpus_per_task: expected a whole number, got '²'",
    ("slurm", "setup=a\nb"): "--slurm: setup: expected a text on one line, got 'a\nb'",
    ("slurm", "partition=a\rb"): "--slurm: partition: expected a text on one line",
    ("slurm", "setup=a\u2028b"): "--slurm: setup: expected a text on one line",
    ("slurm", "account=a\x1b[2J"): "--slurm: account: expected a text on one line",
    ("slurm", "qos=a\0b"): "--slurm: qos: expected a text on one line",
    ("here", "partition=gpu"): "--slurm is for jobs: add --on slurm or --on local-jobs, or leave it out",
    (
        "slurn",
        "partition=gpu",
    ): "--on: there is no 'slurn'. Did you mean 'slurm'? Known: here, slurm, local-jobs",
}


@pytest.mark.parametrize(("on", "given"), MISTAKES)
def test_what_is_asked_for_is_checked_by_name_and_value(on, given):
    with pytest.raises(UserError) as raised:
        slurm.read(on, [given])
    assert MISTAKES[on, given] in str(raised.value)


def test_every_parameter_is_known_to_submitit():
    submitit = pytest.importorskip("submitit", reason="needs submitit")
    known = submitit.SlurmExecutor._valid_parameters()
    assert {name for name, _ in PARAMETERS.values()} <= known
    with pytest.raises(UserError, match="time occurs twice"):
        read("slurm", ["time=1", "time=2"])


def test_a_job_goes_on_where_its_time_was_up():
    job = Job(request={"config": "glue", "overrides": ["a=1"], "force": True}, environment={"X": "1"})
    again = job.checkpoint().function
    assert again == Job(
        request={"config": "glue", "overrides": ["a=1"], "force": False}, environment={"X": "1"}
    )


@pytest.mark.slow
def test_jobs_give_the_records_that_processes_give(cluster, monkeypatch):
    """Three cells each way. What is left out of the comparison says when, how fast and by what command."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = {}
    for on in ("here", "local-jobs"):
        shown = compare("--on", on, "--jobs", "1", f"output.dir={on}")
        assert shown.exit_code == 0, shown.output
        assert "wrote " + on + "/report.html" in shown.output
        made[on] = {r.record.run.name: r.record for r in read_results(on)}
    assert made["here"].keys() == made["local-jobs"].keys()
    assert len(made["here"]) == 3
    for name, record in made["here"].items():
        other = made["local-jobs"][name]
        for part in ("metrics", "routing", "curvature", "data", "model", "seed", "protocol", "backbone"):
            assert getattr(record, part) == getattr(other, part), (name, part)


@pytest.mark.slow
def test_a_job_that_fails_says_why_and_others_go_on(cluster, write):
    """Its reason is in the job's own log."""
    write("{}", "broken/config.json")
    shown = compare("--on", "local-jobs", "backbone=./broken", "--jobs", "1", "--seeds", "1")
    assert shown.exit_code == 1
    lines = [line for line in shown.output.splitlines() if line.startswith("failed: glue/sst2 ")]
    assert len(lines) == 3
    assert all("./broken" in line or "backbone" in line for line in lines), lines
