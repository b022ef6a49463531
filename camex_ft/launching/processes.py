"""Start the processes of a run, show what the first of them prints, and end them all, whatever happens.

A signal that asks this process to end is passed on, so that they save together; a second one ends them at once.
A process leaves at once when its standard input ends, which is a socket that this process holds (see `rank`): so none
outlives it, by whatever signal it ends itself.
"""

from __future__ import annotations

import codecs
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any, BinaryIO

from camex_ft.config import Config, resolve
from camex_ft.launching import placement, rank
from camex_ft.launching.command import command_line, environment
from camex_ft.launching.failures import describe, find_failures
from camex_ft.launching.placement import Placement
from camex_ft.results import provenance, run_name
from camex_ft.training.signals import SIGNALS, Stopped
from camex_ft.utils.errors import UserError
from camex_ft.utils.escaping import printable

POLL = 0.1
SHUTDOWN = 10  # seconds that torch's launcher gives a process before it kills it
PATIENCE = 40.0  # seconds that the launcher gets itself: older ones wait 30 for each process
KEPT = 2000  # lines of what the launcher prints
LOGS = "logs"
STREAMS = ("stdout", "stderr")


class Asked:
    """The first signal that asks this process to end: it is passed on, and the processes end by themselves.

    Attributes:
        number: of the signal; None where there was none.
        pass_on: tells the processes; None as long as there are none.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.pass_on: Callable[[int], None] | None = None

    def serve(self, number: int, frame: FrameType | None) -> None:
        """Serve a signal: a second one ends at once."""
        if self.number is not None or self.pass_on is None:
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)
        self.number = number
        self.pass_on(number)


def launch(placed: Placement, arguments: Sequence[str], written: Config) -> int:
    """Run ``camex-ft`` with `arguments` in all the processes of this node, once `written` is found right.

    Returns:
        the exit code: 0, or 1 where a process failed; that has been told.

    Raises:
        UserError: the configuration is wrong, or a process found the user's input wrong.
        KeyboardInterrupt, Stopped: this process was asked to end; no other is left by then.
    """
    placement.show(placed)
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
    except OSError as error:
        raise UserError(f"output.dir: {logs} cannot be written: {error.strerror or error}") from error
    with _signals() as asked:
        launched = Launched(command, variables)
        asked.pass_on = launched.ask
        tails = (
            [Tail(logs, f"{name}.log", getattr(sys, name)) for name in STREAMS] if placed.node == 0 else []
        )
        try:
            while launched.process.poll() is None:
                for tail in tails:
                    tail.show()
                time.sleep(POLL)
        finally:
            launched.end()
            for tail in tails:
                tail.close()
    code = launched.process.returncode
    if code == 0:
        return 0
    if asked.number is not None:
        raise Stopped(asked.number, launched.step)
    printed = "".join(launched.printed)
    told_of = [report for report in launched.reports if "text" in report]
    failures = find_failures(told_of, printed)
    told = describe(failures, placed=placed, logs=logs, code=code, printed=printed)
    if failures and failures[0].user_error:
        raise UserError(told)
    print(f"error: {printable(told)}", file=sys.stderr)
    return 1


class Launched:
    """The launcher, and what it and its processes tell.

    Attributes:
        process: the launcher.
        reports: what processes tell of their failure, on the socket that is their standard input.
        printed: the last lines that the launcher printed.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        own = {
            "PYTHONUNBUFFERED": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN),
            rank.PARENT: "stdin",
            provenance.COMMAND: provenance.command_line(),  # what was typed, for the record
        }
        # torch's launcher knows nothing of a warning before the time is up, which would end it
        warned = signal.signal(signal.SIGUSR1, signal.SIG_IGN) if hasattr(signal, "SIGUSR1") else None
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables, **own},
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # Ctrl-C is for this process, which ends the others itself
            )
        if warned is not None:
            signal.signal(signal.SIGUSR1, warned)
        self.reports: list[dict[str, Any]] = []
        self.printed: deque[str] = deque(maxlen=KEPT)
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._listen, self._read)]
        for thread in self._threads:
            thread.start()

    @property
    def step(self) -> int | None:
        """The step that the processes saved because they were asked to end; None where they were not in training."""
        return next((report["step"] for report in self.reports if report.get("step") is not None), None)

    def ask(self, number: int) -> None:
        """Ask the processes to end as they would for a signal."""
        with suppress(OSError):
            self.socket.sendall(bytes([number]))

    def end(self) -> None:
        """End the launcher and, by the end of their standard input, all processes; signals wait meanwhile."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join(timeout=2)
        self.socket.close()

    def _listen(self) -> None:
        with suppress(OSError, ValueError), self.socket.makefile(encoding="utf-8") as lines:
            for line in lines:
                self.reports.append(json.loads(line))

    def _read(self) -> None:
        assert self.process.stdout is not None
        with suppress(OSError, ValueError), self.process.stdout as lines:
            self.printed.extend(lines)


class Tail:
    """Shows what the first process of this node adds to one of its files, as it is: progress bars stay such."""

    def __init__(self, logs: Path, name: str, to: IO[str]) -> None:
        self.logs, self.name, self.to = logs, name, to
        self.file: BinaryIO | None = None
        self.decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self.last = "\n"

    def show(self) -> None:
        """Write what has been added since the last call."""
        if self.file is None:
            found = sorted(self.logs.glob(f"*/attempt_*/0/{self.name}"))
            self.file = found[-1].open("rb") if found else None
        if self.file is not None and (added := self.decode(self.file.read())):
            self.last = added[-1]
            self._write(added)

    def close(self) -> None:
        """Show the rest, end the line and let go of the file."""
        self.show()
        if self.last != "\n":
            self._write("\n")
        if self.file is not None:
            self.file.close()

    def _write(self, text: str) -> None:
        with suppress(BrokenPipeError):  # nobody reads any more: the run goes on
            self.to.write(text)
            self.to.flush()


@contextmanager
def _signals() -> Iterator[Asked]:
    """Serve signals that ask to end while the body runs; then as they were."""
    asked = Asked()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, asked.serve)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
