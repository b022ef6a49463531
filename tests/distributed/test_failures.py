"""A process that is killed or raises, and a full disk: real runs of two processes, each ended and told of in time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SECONDS = 60  # from the fault to the end of everything
FAULTY = '''
"""`faulty`: domain vectors as they are, and a process that comes to grief."""

import os, resource, signal, time
from pathlib import Path

from torch import Tensor

from camex_ft.utils.errors import UserError
from camex_ft.protocols import protocol

calls = 0


@protocol("faulty", summary="fails", source="a test")
def faulty(tau: Tensor) -> Tensor | None:
    """Fail at the twentieth call, in one process."""
    global calls
    calls += 1
    if calls == 20 and os.environ["RANK"] == os.environ["FAULTY_RANK"]:
        Path(os.environ["FAULTY_NOTE"]).write_text(str(time.time()))
        how = os.environ["FAULTY"]
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raise":
            raise ValueError("the moon is full")
        if how == "user":
            raise UserError("the moon is not yours")
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(how), int(how)))  # bytes of a file: then writing fails
    return None
'''
SMALL = (
    *("profile=embedded", "task.name=sst2", "data.train_rows=64", "data.eval_rows=32", "output.dir=out"),
    *("merging.protocol=faulty", "merging.experts=2", "training.max_steps=6", "training.logging_steps=1"),
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of a file's size")
@pytest.mark.parametrize(
    ("faulty", "where", "more", "code", "told"),
    [
        ("kill", 1, (), 1, "error: rank 1 of 2 failed: ended by SIGKILL"),
        ("kill", 0, (), 1, "error: rank 0 of 2 failed: ended by SIGKILL"),
        ("raise", 1, (), 1, "error: rank 1 of 2 failed: ValueError: the moon is full"),
        ("user", 1, (), 2, "error: the moon is not yours"),
        # 100 kB: a checkpoint is larger; 1 kB: the first line of the history, and then the log itself, is
        ("100000", 0, (), 2, "error: output.dir: there is no room left to write in 'out'"),
        (
            "1000",
            0,
            ("training.save_strategy=no", "training.load_best_model_at_end=false"),
            2,
            "error: output.dir: there",
        ),
    ],
)
def test_a_failure_ends_the_run(
    tmp_path: Path, faulty: str, where: int, more: tuple[str, ...], code: int, told: str
):
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "faulty.py").write_text(FAULTY)
    note = tmp_path / "note"
    own = {
        "CAMEX_FT_PLUGINS": str(tmp_path / "plugins"),
        "FAULTY": faulty,
        "FAULTY_RANK": str(where),
        "FAULTY_NOTE": str(note),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "camex_ft", "run", "glue", *SMALL, *more, "--cpus", "2"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **own}, capture_output=True, text=True, timeout=240
    )
    assert time.time() - float(note.read_text()) < SECONDS
    lines = done.stderr.splitlines()
    (said,) = [n for n, line in enumerate(lines) if line.startswith("error: ")]  # once
    assert lines[said].startswith(told), done.stderr
    assert done.returncode == code
    (log,) = [
        word.rstrip(")") for word in " ".join(lines[said:]).split() if word.rstrip(")").endswith("stderr.log")
    ]
    assert (tmp_path / log).is_file()
    assert Path(log).parent.name == str(where)
    if code == 1 or faulty.isdigit():
        assert "goes on from the last checkpoint" in done.stderr
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in left
    assert not list(tmp_path.glob("out/runs/*/record.json"))
