"""scripts/reproduce_tables.sh: what it checks, and the commands that it gives; `camex-ft` is played by a script."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "reproduce_tables.sh"
ALL = " ".join(
    sorted(
        str(p.relative_to(SCRIPT.parents[1])) for p in (SCRIPT.parents[1] / "configs/tables").glob("*.yaml")
    )
)
CAMEX = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
    doctor) echo "device: [${STATE:-ok}] some" ;;
    *--dry-run*) printf 'profile x: why\\nglue/rte dense\\n12 cells, 3 of them missing: 1.0 hours\\n' ;;
    *) echo running; exit ${CODE:-0} ;;
esac
"""
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def script(tmp_path):
    """Call the script with variables; return what it printed and what it called."""
    calls = tmp_path / "calls"
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name, text in (("camex-ft", CAMEX), ("python", "#!/bin/sh\nexit ${CUDA:-1}\n")):
        (tmp_path / "venv" / "bin" / name).write_text(text)
        (tmp_path / "venv" / "bin" / name).chmod(0o755)

    def script(*options: str, **variables: str):
        calls.write_text("")
        known = {"VENV": str(tmp_path / "venv"), "LOGS": str(tmp_path / "logs"), "CALLS": str(calls)}
        done = subprocess.run(
            [str(SCRIPT), *options],
            env={"PATH": os.environ["PATH"], **known, **variables},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        return done, calls.read_text().splitlines()

    return script


def test_it_checks_then_estimates_then_runs_and_keeps_a_log(script, tmp_path):
    done, calls = script(CUDA="0", JOBS="4", SET="a.b=1 c=[1,2]")
    assert done.returncode == 0, done.stderr
    run = f"compare {ALL} profile=paper a.b=1 c=[1,2] --jobs 4"
    assert calls == ["doctor", f"{run} --dry-run", run]
    assert "12 cells, 3 of them missing" in done.stdout
    assert "glue/rte dense" not in done.stdout  # the sums alone
    [log] = (tmp_path / "logs").iterdir()
    assert log.read_text() == "running\n"


def test_a_dry_run_runs_nothing_and_needs_no_gpu(script, tmp_path):
    done, calls = script("--dry-run", SPECS="configs/tables/qa.yaml")
    assert done.returncode == 0
    assert calls == ["doctor", "compare configs/tables/qa.yaml profile=paper --dry-run"]
    assert "glue/rte dense" in done.stdout
    assert not (tmp_path / "logs").exists()


def test_a_cluster_is_asked_for_what_is_said(script):
    done, calls = script("--slurm", "partition=gpu", "setup=module load cuda", SPECS="configs/tables/qa.yaml")
    assert done.returncode == 0
    compare = "compare configs/tables/qa.yaml profile=paper"
    assert calls[-1] == f"{compare} --on slurm --slurm partition=gpu --slurm setup=module load cuda"


def test_a_failed_cell_is_its_exit_code(script):
    assert script(CUDA="0", CODE="1")[0].returncode == 1
    assert script("--slurm", CODE="1")[0].returncode == 1


@pytest.mark.parametrize(
    ("options", "variables", "message"),
    [
        (["--dry"], {}, "there is no option '--dry': expected --dry-run"),
        (["partition=gpu"], {}, "'partition=gpu' is for --slurm"),
        ([], {}, "there is no CUDA device here"),
        ([], {"SPECS": "configs/tables/none.yaml"}, "there is no specification configs/tables/none.yaml"),
        ([], {"VENV": "/nowhere"}, "there is no /nowhere/bin/camex-ft: run make install"),
        (["--dry-run"], {"STATE": "wrong"}, "mend what is wrong above"),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(script, options, variables, message):
    done, calls = script(*options, **variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert not any("compare" in call for call in calls)


def test_help_is_its_header(script):
    done, calls = script("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("The tables of the paper") and "VENV=.venv" in done.stdout
    assert not calls
