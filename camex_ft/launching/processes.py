"""Start the processes of a run, show what the first of them prints, and end them all, whatever happens.

A process leaves at once when its standard input ends, which is a pipe that this process holds (see `rank`): so none
outlives it, by whatever signal it ends itself.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, BinaryIO

from camex_ft.config import Config, resolve
from camex_ft.errors import UserError
from camex_ft.launching import devices, rank
from camex_ft.launching.command import command_line, environment
from camex_ft.launching.failures import describe, find_failures
from camex_ft.launching.placement import Placement
from camex_ft.results import run_name

POLL = 0.1
SHUTDOWN = 10  # seconds that torch's launcher gives a process before it kills it
PATIENCE = 40.0  # seconds that the launcher gets itself: older ones wait 30 for each process
LOGS, LAUNCHER = "logs", "launcher.log"
STREAMS = {"stdout.log": sys.stdout, "stderr.log": sys.stderr}


class Stopped(BaseException):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def code(self) -> int:
        """The exit code by which a shell knows it."""
        return 128 + self.number

    def __str__(self) -> str:
        """The signal's name."""
        return signal.Signals(self.number).name


def launch(placed: Placement, arguments: Sequence[str], written: Config) -> int:
    """Run ``camex-ft`` with `arguments` in all the processes of this node, once `written` is found right.

    Returns:
        the exit code: 0, or 1 where a process failed; that has been told.

    Raises:
        UserError: the configuration is wrong, or a process found the user's input wrong.
        KeyboardInterrupt, Stopped: this process was asked to end; no other is left by then.
    """
    devices.show(placed)
    settled, _ = resolve(written)
    name = run_name(
        suite=settled.task.suite,
        task=settled.task.name,
        backbone=settled.backbone,
        protocol=settled.merging.protocol,
        seed=settled.training.seed,
        hash8=time.strftime("%Y%m%d-%H%M%S"),
    )
    own = f"{name}-{os.getpid()}" + (f"-node{placed.node}" if placed.nodes > 1 else "")
    return run(placed, arguments, logs=settled.output.path / LOGS / own)


def run(placed: Placement, arguments: Sequence[str], *, logs: Path) -> int:
    """Run ``camex-ft`` with `arguments` in all the processes of a node; return its exit code.

    What starts them is printed as it could be typed. The first process's output is shown here; that of each goes to
    files in `logs`.

    Args:
        placed: where they go.
        arguments: of ``camex-ft``, without those that ask for processes.
        logs: a new folder.

    Raises:
        UserError: a process found the user's input wrong.
        KeyboardInterrupt, Stopped: this process was asked to end; no other is left by then.
    """
    variables = environment(placed)
    command = command_line(placed, arguments, logs=logs)
    print(f"{placed}; what each prints: {logs}")
    print(
        shlex.join([*(["env"] if variables else []), *(f"{k}={v}" for k, v in variables.items()), *command])
    )
    sys.stdout.flush()
    try:
        logs.mkdir(parents=True)
        launched = (logs / LAUNCHER).open("wb")
    except OSError as error:
        raise UserError(f"output.dir: {logs} cannot be written: {error.strerror or error}") from error
    with launched:
        code = _attend(command, variables, launched, logs, show=placed.node == 0)
    if code == 0:
        return 0
    failures = find_failures(logs, launcher=logs / LAUNCHER)
    told = describe(failures, placed=placed, logs=logs, code=code)
    if failures and failures[0].user_error:
        raise UserError(told)
    print(f"error: {told}", file=sys.stderr)
    return 1


def _attend(
    command: Sequence[str], variables: Mapping[str, str], log: BinaryIO, logs: Path, *, show: bool
) -> int:
    """Start the launcher, look after it until it ends, and return its exit code."""
    own = {"PYTHONUNBUFFERED": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN), rank.PARENT: "stdin"}
    with _signals():
        launcher = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables, **own},
            start_new_session=True,  # Ctrl-C is for this process, which ends the others itself
        )
        tails = [Tail(logs, name, to) for name, to in STREAMS.items()] if show else []
        try:
            while launcher.poll() is None:
                for tail in tails:
                    tail.show()
                time.sleep(POLL)
        finally:
            _end(launcher)
            for tail in tails:
                tail.show()
                tail.close()
    return launcher.returncode


class Tail:
    """Shows what the first process of this node adds to one of its files, as it is: progress bars stay such."""

    def __init__(self, logs: Path, name: str, to: IO[str]) -> None:
        self.logs, self.name, self.to = logs, name, to
        self.file: BinaryIO | None = None

    def show(self) -> None:
        """Write what has been added since the last call."""
        if self.file is None:
            found = sorted(self.logs.glob(f"*/attempt_*/0/{self.name}"))
            self.file = found[-1].open("rb") if found else None
        if self.file is not None and (added := self.file.read()):
            with suppress(BrokenPipeError):  # nobody reads any more: the run goes on
                self.to.write(added.decode("utf-8", errors="replace"))
                self.to.flush()

    def close(self) -> None:
        """Let go of the file."""
        if self.file is not None:
            self.file.close()


def _end(launcher: subprocess.Popen[bytes]) -> None:
    """End the launcher and, by the end of their standard input, all processes; signals wait meanwhile."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    assert launcher.stdin is not None
    with suppress(BrokenPipeError):
        launcher.stdin.close()
    if launcher.poll() is None:
        launcher.terminate()
        try:
            launcher.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            launcher.kill()
    launcher.wait()


@contextmanager
def _signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP exceptions, as SIGINT is one; then as they were."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
