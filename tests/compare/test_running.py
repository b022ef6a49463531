"""Processes that run cells, played by small ones: what becomes of each, and that none is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from camex_ft.compare import running
from camex_ft.compare.running import (
    DEVICES,
    DONE,
    FAILED,
    RUNNING,
    THREADS,
    CellState,
    Runner,
    Slot,
    slots,
    why,
)

# A process that does what the cell's row says: `name: code` in Python, given `request`.
ACTOR = """
import json, os, signal, sys, threading, time
request = json.loads(sys.stdin.readline())
row = [o for o in request["overrides"] if o.startswith("data.dir=")][0].partition("=")[2]
pid = open(os.environ["PIDS"] + "/" + str(os.getpid()), "w"); pid.close()
def tell(step): print(json.dumps({"step": step, "steps": 4}), flush=True)
def leave():
    while os.read(0, 100): pass
    os._exit(130)
threading.Thread(target=leave, daemon=True).start()
exec(BEHAVIOUR[row])
"""
BEHAVIOUR = {
    "done": "tell(1); tell(2); sys.exit(0)",
    "wrong": "print('noise\\nerror: data.dir: no such folder\\n  and more', file=sys.stderr); sys.exit(2)",
    "fault": "raise RuntimeError('two words')",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "segfault": "os.kill(os.getpid(), signal.SIGSEGV)",
    "silent": "sys.exit(3)",
    "forever": "tell(1); time.sleep(600)",
    "babble": "print('not json', flush=True); sys.exit(0)",
    "environment": "print(os.environ.get('CUDA_VISIBLE_DEVICES'), file=sys.stderr); sys.exit(1)",
}

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")


@pytest.fixture
def play(compared, folder, monkeypatch):
    """Return a runner whose cells behave as named, on one slot or more."""
    (folder / "pids").mkdir()
    monkeypatch.setenv("PIDS", str(folder / "pids"))
    actor = f"BEHAVIOUR = {BEHAVIOUR!r}\n{ACTOR}"
    monkeypatch.setattr(running, "COMMAND", (sys.executable, "-c", actor))
    monkeypatch.setattr(running, "POLL", 0.01)

    def play(*names: str, places: int = 1, **options):
        cells = compared(
            f"config: glue\nrows: [{{data.dir: [{', '.join(names)}]}}]\nbaseline: dir {names[0]}\nseeds: 1"
        )
        states = [CellState(cell=c, name=n) for c, n in zip(cells.cells, names, strict=True)]
        made = [Slot(device=None, environment={}) for _ in range(places)]
        return Runner(states, made, folder / "logs", **options)

    return play


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids(folder: Path) -> list[int]:
    return [int(file.name) for file in (folder / "pids").iterdir()]


def until(true, seconds=10.0) -> bool:
    ends = time.monotonic() + seconds
    while not true() and time.monotonic() < ends:
        time.sleep(0.01)
    return bool(true())


def test_what_becomes_of_each(play, folder):
    seen = []
    runner = play(
        *(name for name in BEHAVIOUR if name != "forever"),
        places=3,
        changed=lambda s: seen.append((s.name, s.status)),
    )
    runner.run()
    found = {state.name: (state.status, state.reason) for state in runner.states}
    assert found == {
        "done": (DONE, ""),
        "babble": (DONE, ""),
        "wrong": (FAILED, "data.dir: no such folder and more"),
        "fault": (FAILED, "RuntimeError: two words"),
        "killed": (FAILED, "ended by SIGKILL, perhaps because memory ran out"),
        "segfault": (FAILED, "ended by SIGSEGV"),
        "silent": (FAILED, "exit code 3, without a message"),
        "environment": (FAILED, "None"),
    }
    for state in runner.states:  # each began and ended once, and has a log
        assert [status for name, status in seen if name == state.name] == [RUNNING, state.status]
        assert state.log == folder / "logs" / f"{state.name}.log"
        assert state.seconds is not None and state.seconds > 0
    assert not any(alive(pid) for pid in pids(folder))
    assert "noise" in (folder / "logs" / "wrong.log").read_text()


def test_progress_is_heard_and_gives_the_time_left(play):
    runner = play("forever")
    [state] = runner.states
    shares = []

    def tick():
        shares.append(state.share)
        if state.share:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(tick)
    assert (shares[0], shares[-1]) == (0.0, 0.25)
    took = time.monotonic() - state.started
    assert state.left == pytest.approx(3 * took, rel=0.5)


def test_an_interruption_leaves_no_process(play, folder):
    runner = play("forever", "done", "wrong", places=2)

    def tick():
        if len(pids(folder)) >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(tick)
    assert len(pids(folder)) >= 2
    assert not any(alive(pid) for pid in pids(folder))


def test_no_more_run_at_a_time_than_there_are_slots(play):
    runner = play("done", "silent", "fault", "wrong", places=2)
    most = []
    runner.run(lambda: most.append(sum(s.status == RUNNING for s in runner.states)))
    assert max(most) <= 2
    assert all(s.status in (DONE, FAILED) for s in runner.states)


def test_cells_that_are_done_or_failed_before_are_left_alone(play, folder):
    runner = play("done", "wrong", "silent")
    runner.states[0].status, runner.states[1].status = DONE, FAILED
    runner.run()
    assert len(pids(folder)) == 1
    assert runner.states[2].status == FAILED


PARENT = """
import json, subprocess, sys
worker = subprocess.Popen([sys.executable, "-m", "camex_ft.compare.worker"], stdin=subprocess.PIPE, text=True,
                          start_new_session=True)
worker.stdin.write(json.dumps({"config": "glue", "overrides": [], "force": False}) + "\\n")
worker.stdin.flush()
print(worker.pid, flush=True)
worker.wait()
"""


def test_a_worker_leaves_when_its_parent_is_killed(folder):
    """Not even `kill -9` leaves a process that trains on: it would write what the next call writes."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    try:
        worker = int(parent.stdout.readline())
        assert until(lambda: threads(worker) > 1)  # it listens
        assert alive(worker)
        parent.kill()
        assert until(lambda: not alive(worker), seconds=5)
    finally:
        parent.kill()
        parent.communicate()
    assert not (folder / "results" / "runs").exists()


def threads(pid: int) -> int:
    try:
        return len(list(Path(f"/proc/{pid}/task").iterdir()))
    except OSError:
        return 0


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("noise\nerror: no 'x'\n  at a\n  at b\n  at c\n", "no 'x' at a at b"),
        (
            "Traceback (most recent call last):\n  File x\npkg.SomeError: why: so\n\nThis is a fault of camex_ft, not",
            None,
        ),
        (
            "Traceback\nKeyError: 1\nDuring it\nTraceback\n  File y: z\nOSError: [Errno 28] No space left",
            None,
        ),
        (
            "error: output.dir: this run is under way already, by process 7 on node1\nIts folder is there.\n",
            "output.dir: this run is under way already, by process 7 on node1 Its folder is there.",
        ),
        ("warning: slow\n", "warning: slow"),
        ("", "exit code 1, without a message"),
    ],
)
def test_the_reason_is_the_error_itself(tmp_path, log, reason):
    file = tmp_path / "log"
    file.write_text(log)
    expected = (
        reason
        or {"p": "pkg.SomeError: why: so", "K": "OSError: [Errno 28] No space left"}[
            "p" if "pkg" in log else "K"
        ]
    )
    assert why(1, file) == expected


def test_one_slot_a_core_with_one_thread_for_tiny_models_and_one_for_others(monkeypatch):
    monkeypatch.setattr(running, "visible_gpus", list)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv(THREADS, raising=False)
    for jobs, count, threads_ in ((None, 8, "1"), (1, 1, "8"), (3, 3, "2"), (16, 16, "1")):
        made = slots(jobs)
        assert len(made) == count
        assert all((s.device, s.environment) == (None, {THREADS: threads_}) for s in made)
    assert [s.environment for s in slots(tiny=False)] == [{THREADS: "8"}]
    monkeypatch.setenv(THREADS, "5")  # what the user says is kept
    assert [s.environment for s in slots(2)] == [{}, {}]


def test_one_slot_a_gpu(monkeypatch):
    monkeypatch.setattr(running, "visible_gpus", lambda: ["3", "GPU-ab"])
    for jobs, devices in ((None, ["3", "GPU-ab"]), (1, ["3"]), (3, ["3", "GPU-ab", "3"])):
        made = slots(jobs)
        assert [s.device for s in made] == devices
        assert [s.environment for s in made] == [{DEVICES: name} for name in devices]


def test_a_slot_hands_its_environment_over(play):
    runner = play("environment")
    runner.slots[0].environment = {DEVICES: "GPU-ab"}
    runner.run()
    assert runner.states[0].reason == "GPU-ab"
