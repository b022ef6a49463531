"""A disk that fills up at random moments: told as such, and nothing that was complete is lost."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from camex_ft.training.checkpoint_folder import checkpoints, damage, step_of
from tests.helpers.killed_runs import Runs, differences, folder_of, outcome, write

TIMES = 10
PAGE = 4096  # what a tmpfs counts in


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1g", "none", str(folder)]
    if os.name != "posix" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def used(disk: Path) -> int:
    there = os.statvfs(disk)
    return (there.f_blocks - there.f_bfree) * there.f_frsize


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_complete_is_lost(disk: Path, tmp_path: Path) -> None:
    runs = Runs()
    log = tmp_path / "log"
    config = write(disk / "out", "ties-ca", tmp_path / "run.yaml")
    assert runs.whole(config, log) == 0, log.read_text()
    whole = outcome(disk / "out")
    draw, full, ends = random.Random(0), 0, 0
    model = sum(len(held) for name, held in whole["files"].items() if name.startswith("model"))
    subprocess.run(["rm", "-rf", str(disk / "out")], check=True)
    steps: list[int] = []
    while full < TIMES:
        # a checkpoint takes some three times the model, and several are kept
        resize(disk, used(disk) + PAGE * draw.randint(1, 8 * model // PAGE))
        before = (
            max(map(step_of, checkpoints(folder_of(disk / "out") / "checkpoints")), default=0)
            if folder_of(disk / "out")
            else 0
        )
        log.unlink(missing_ok=True)
        code = runs.whole(config, log)
        if code == 0:
            assert list(differences(outcome(disk / "out"), whole)) == []
            subprocess.run(["rm", "-rf", str(disk / "out")], check=True)
            ends += 1
            continue
        full += 1
        assert code == 2 and "there is no room left to write" in log.read_text(), log.read_text()
        assert "Traceback" not in log.read_text()
        folder = folder_of(disk / "out")
        if folder is not None:
            found = checkpoints(folder / "checkpoints")
            assert [damage(each) for each in found] == [None] * len(found)  # complete or absent
            assert not list((folder / "checkpoints").glob(".*"))  # and the disk has its room back
            assert max(map(step_of, found), default=0) >= before
            assert not (folder / "record.json").exists()
            steps.append(max(map(step_of, found), default=0))
    resize(disk, 1 << 30)
    assert runs.whole(config, log) == 0, log.read_text()
    assert list(differences(outcome(disk / "out"), whole)) == []
    print(f"{full} full disks, after steps {steps}, {ends + 1} runs ended as their twin")
    runs.close()
