"""Launcher and processes, played by scripts: output, reports, signals; no process outlives the one that launched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from camex_ft.launching import processes, rank
from camex_ft.launching.placement import Placement
from camex_ft.utils.errors import UserError

TWO = Placement(device="cpu", processes=2)

# What torch's launcher does, for one process: log files, variables, its exit code, and a report.
LAUNCHER = """
import os, subprocess, sys
logs, script = sys.argv[1:]
folder = os.path.join(logs, "none_abc", "attempt_0", "0")
os.makedirs(folder)
print("[default0]:noise of the launcher")
with open(folder + "/stdout.log", "wb") as out, open(folder + "/stderr.log", "wb") as err:
    own = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_ERROR_FILE": folder + "/error.json"}
    child = subprocess.Popen([sys.executable, script], stdout=out, stderr=err, env=own, start_new_session=True)
    open(os.path.join(logs, "pid"), "w").write(str(child.pid))
    code = child.wait()
print("  rank      : 0 (local_rank: 0)\\n  exitcode  : %d (pid: 1)" % code)
sys.exit(1 if code else 0)
"""
RANK = """
import os, signal, sys, time
import camex_ft_cli  # as the command does: nothing is registered with transformers, which takes seconds
from camex_ft.utils.errors import UserError
from camex_ft.launching import rank
def command():
    print("progress 1\\rprogress 2", flush=True)
    {body}
sys.exit(rank.run(command))
"""


def script(body: str) -> str:
    return RANK.format(body=body)


def command(folder: Path, body: str) -> list[str]:
    """The launcher, with a process that does `body`; both in files, since the command is printed."""
    (folder / "launcher.py").write_text(LAUNCHER)
    (folder / "rank.py").write_text(script(body))
    return [sys.executable, str(folder / "launcher.py"), str(folder / "logs"), str(folder / "rank.py")]


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> int:
    monkeypatch.setattr(processes, "command_line", lambda placed, arguments, logs: command(folder, body))
    return processes.run(TWO, ["run"], logs=folder / "logs")


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends in time; a zombie has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
        if not state.strip() or state.startswith("Z"):
            return True
        time.sleep(0.05)
    return False


def test_the_first_process_is_shown_as_it_prints(tmp_path, monkeypatch, capfd):
    assert run(tmp_path, monkeypatch, "print('é ' * 3, file=sys.stderr)") == 0
    out, err = capfd.readouterr()
    assert out.splitlines()[0].startswith("2 processes (cpu, ddp)")
    assert out.splitlines()[1].startswith("env ACCELERATE_USE_CPU=true ")
    assert out.endswith("progress 1\rprogress 2\n")
    assert "noise" not in out + err
    assert err == "é é é \n"


def test_a_users_error_comes_out_once_as_such(tmp_path, monkeypatch, capfd):
    with pytest.raises(UserError, match=r"^no such moon\n\(rank 0 of 2; its log: "):
        run(tmp_path, monkeypatch, "raise UserError('no such moon')")
    assert "moon" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("raise ValueError('first\\nsecond')", "rank 0 of 2 failed: ValueError: first"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "rank 0 of 2 failed: ended by SIGSEGV"),
        ("sys.exit(5)", "rank 0 of 2 failed: SystemExit: 5"),
        ("os._exit(7)", "rank 0 of 2 failed: exit code 7"),
        ("raise RuntimeError('x gloo/transport y')", "rank 0 of 2 has lost another process: RuntimeError"),
    ],
)
def test_a_failure_is_told_with_its_rank_cause_and_log(tmp_path, monkeypatch, capfd, body, told):
    assert run(tmp_path, monkeypatch, body) == 1
    err = capfd.readouterr().err
    last = err[err.index("error: ") :].splitlines()
    assert last[0].startswith(f"error: {told}")
    assert last[1].endswith(f"log: {tmp_path}/logs/none_abc/attempt_0/0/stderr.log")
    assert last[2] == "The same command goes on from the last checkpoint."


def test_a_failed_process_does_not_wait_at_its_exit(tmp_path, monkeypatch, capfd):
    """What it would run at exit may wait for other processes, which wait for it."""
    started = time.monotonic()
    body = "import atexit; atexit.register(time.sleep, 60); raise ValueError('no')"
    assert run(tmp_path, monkeypatch, body) == 1
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_no_process_is_left_behind(tmp_path, number):
    """The process that launched gets a signal; the one launched sleeps and would go on."""
    parent = f"""
        import sys
        from pathlib import Path
        import camex_ft_cli
        from camex_ft.launching import processes
        from camex_ft.launching.placement import Placement
        command = {command(tmp_path, "time.sleep(100)")!r}
        processes.command_line = lambda placed, arguments, logs: command
        try:
            processes.run(Placement(device="cpu", processes=2), ["run"], logs=Path({str(tmp_path / "logs")!r}))
        except processes.Stopped as stopped:
            sys.exit(stopped.code)
        except KeyboardInterrupt:
            sys.exit(130)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(parent)], stdout=subprocess.DEVNULL)
    log, end = tmp_path / "logs/none_abc/attempt_0/0/stdout.log", time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and time.monotonic() < end:
        time.sleep(0.05)
    pid = int((tmp_path / "logs/pid").read_text())
    assert not gone(pid, 0.0)
    process.send_signal(number)
    expected = -9 if number == signal.SIGKILL else 128 + number
    assert process.wait(timeout=20) == expected
    assert gone(pid)


def test_logs_that_cannot_be_written_are_told_before_anything_starts(tmp_path, monkeypatch):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(UserError, match=r"output\.dir: .*logs cannot be written"):
        run(tmp_path, monkeypatch, "pass")


# -- in a process -----------------------------------------------------------------------------------------------------


def test_only_what_torchs_launcher_has_started_is_one_of_several():
    assert rank.inside({rank.FILE: "x"})
    assert not rank.inside({"RANK": "0"})


def test_without_our_parent_a_process_says_its_error_itself(tmp_path):
    """Under ``accelerate launch -m camex_ft``; torch's launcher finds the error in its file."""
    error = tmp_path / "error.json"
    done = subprocess.run(
        [sys.executable, "-c", script("raise UserError('no such moon')")],
        env={**os.environ, rank.FILE: str(error), "RANK": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, "error: no such moon\n")
    assert '"message": "UserError: no such moon"' in error.read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_a_full_disk_under_the_logs_ends_a_process_all_the_same(tmp_path):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", script("pass")],
            env={**os.environ, rank.FILE: "/dev/full", "RANK": "1"},
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=full,
            timeout=60,
        )
    assert done.returncode == 1
