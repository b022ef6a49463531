"""Tests do not depend on the caller's environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.own_environment import clean

ROOT = Path(__file__).resolve().parents[1]
ODD = {
    "HF_HUB_OFFLINE": "1",
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "TRANSFORMERS_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "7",
    "LC_ALL": "C",
    "LANG": "tr_TR.UTF-8",
    "XDG_CACHE_HOME": "/proc/none",
    "NO_COLOR": "1",
    "COLUMNS": "31",
    "PYTHONHASHSEED": "12345",
    "WANDB_MODE": "online",
    "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    "SLURM_JOB_ID": "1",
    "SLURM_NTASKS": "4",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "https_proxy": "http://127.0.0.1:9",
}


def test_what_the_caller_has_set_is_gone():
    kept = {"PATH": "/bin", "HOME": "/root", "OMP_NUM_THREADS": "1", "PYTEST_XDIST_WORKER": "gw0"}
    variables = {**ODD, **kept}
    clean(variables)
    assert variables == {**kept, "LANG": "C.UTF-8", "TERM": "xterm"}
    assert clean(odd := {"OMP_NUM_THREADS": "4,2"}) is None and "OMP_NUM_THREADS" not in odd


def test_it_is_gone_before_a_library_is_imported(tmp_path):
    """A suite of one test, in a process with an odd environment and umask, below the suite's own conftest."""
    probe = tmp_path / "test_probe.py"
    probe.write_text(
        "import os\n"
        "from huggingface_hub import constants\n"
        "def test_probe():\n"
        "    assert not constants.HF_HUB_OFFLINE and constants.ENDPOINT == 'https://huggingface.co'\n"
        "    assert os.umask(0o022) == 0o022 and 'RANK' not in os.environ and 'COLUMNS' not in os.environ\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        str(ROOT / "pyproject.toml"),
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, "--rootdir", str(ROOT), "--confcutdir", str(ROOT), "-p", "tests.conftest", str(probe)],
        cwd=ROOT,
        env={**os.environ, **ODD, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        umask=0o077,
    )
    assert done.returncode == 0, done.stdout + done.stderr
