"""Several processes that are asked to stop: all save together, and the same command goes on to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from camex_ft.training.checkpoint_folder import checkpoints, damage, processes, step_of
from tests.helpers.killed_runs import differences, folder_of, outcome, write


def command(output: Path, *more: str) -> list[str]:
    config = write(output, "ties-ca", output.with_suffix(".yaml"))
    return [sys.executable, "-m", "camex_ft", "run", str(config), *more, "--cpus", "2"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_all_save_together(engine: str, tmp_path: Path) -> None:
    more = ("--engine", engine)
    own = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command(tmp_path / "whole", *more), env=own, check=True, capture_output=True)
    asked = subprocess.Popen(
        command(tmp_path / "asked", *more),
        env=own,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    end = time.monotonic() + 300
    while time.monotonic() < end and asked.poll() is None:
        folder = folder_of(tmp_path / "asked")
        if folder is not None and (folder / "history.jsonl").exists():
            break
        time.sleep(0.005)
    asked.send_signal(signal.SIGTERM)
    _, said = asked.communicate(timeout=120)
    assert asked.returncode == 143, said
    assert folder is not None
    newest = checkpoints(folder / "checkpoints")[0]
    assert damage(newest) is None and processes(newest) == 2
    assert f"Ended by SIGTERM. The same command goes on from step {step_of(newest)}, which is saved." in said
    assert subprocess.run(["pgrep", "-f", str(tmp_path / "asked")], capture_output=True).returncode == 1
    subprocess.run(command(tmp_path / "asked", *more), env=own, check=True, capture_output=True)
    assert list(differences(outcome(tmp_path / "asked"), outcome(tmp_path / "whole"))) == []
