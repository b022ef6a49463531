"""Start the processes of a run, show the output of the first, end them all, and report the failure that came first.

A signal that asks this process to end is passed on, so that they save together; a second one ends them at once. Each
process exits when its standard input ends, a socket that this process holds (see `rank`): so none outlives it, whatever
signal ends it.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import IO, Any, BinaryIO

from camex_ft.config import Config, resolve
from camex_ft.launching import rank
from camex_ft.launching.placement import Placement, command_line, environment, show
from camex_ft.results import provenance, run_name
from camex_ft.training.signals import SIGNALS, Stopped
from camex_ft.utils.errors import UserError, exit_reason
from camex_ft.utils.escaping import printable

POLL = 0.1
SHUTDOWN = 10  # seconds before torch's launcher kills a process
PATIENCE = 40.0  # seconds before the launcher is killed: older ones wait 30 for each process
KEPT = 2000  # last lines of the launcher's output
LOGS = "logs"
STREAMS = ("stdout", "stderr")
AGAIN = "The same command goes on from the last checkpoint."
# The report that torch's launcher ends with: one such block a process that failed.
BLOCK = re.compile(r"^ +rank +: (\d+) \(local_rank: (\d+)\)\n +exitcode +: (-?\d+) ", flags=re.MULTILINE)
# Signals that a process gets because another one failed: from the launcher, or from a backend that gives up.
FOLLOWING = (signal.SIGTERM, signal.SIGABRT)
# Last lines of the launcher's output that are shown if no process reports a reason.
LINES = 5


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A process that failed."""

    rank: int
    local: int  # its rank on this node
    code: int | None = None  # its exit code; minus the signal's number where a signal ended it
    text: str = ""  # its own message
    user_error: bool = False  # the message is that of a `UserError`
    lost: bool = False  # the message only says that another process is gone
    time: float = 0.0  # of the message, in seconds

    @property
    def order(self) -> tuple[int, float, int]:
        """Sorts causes before their consequences."""
        if self.text:
            return (3 if self.lost else 1, self.time, self.rank)
        if self.code is None or self.code >= 0:
            return (2, 0.0, self.rank)
        return (4 if -self.code in FOLLOWING else 0, 0.0, self.rank)

    def __str__(self) -> str:
        return self.text or exit_reason(self.code)


def find_failures(reports: Iterable[Mapping[str, Any]], printed: str) -> list[Failure]:
    """Return the processes of this node that failed, the cause first.

    They are found in the processes' own reports, see `rank`, and in what torch's launcher prints, their exit codes.
    """
    failures = {report["rank"]: Failure(**report) for report in reports}
    for words in BLOCK.findall(printed):
        number, local, code = map(int, words)
        failures[number] = replace(failures.get(number, Failure(rank=number, local=local)), code=code)
    return sorted(failures.values(), key=lambda failure: failure.order)


def describe(failures: Sequence[Failure], *, placed: Placement, logs: Path, code: int, printed: str) -> str:
    """Return the message about failures, of which the first is the cause; `code` and `printed` are the launcher's."""
    if not failures:
        last = "".join(f"\n  {line}" for line in printed.strip().splitlines()[-LINES:])
        ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
        return f"the launcher {ended}, and no process reported a reason. Logs: {logs}{last}\n{AGAIN}"
    cause = failures[0]
    paths = sorted(logs.glob(f"*/attempt_*/{cause.local}/stderr.log"))
    who, log = f"rank {cause.rank} of {placed.all}", paths[-1] if paths else logs
    if cause.user_error:
        return f"{cause.text}\n({who}; its log: {log})"
    if cause.lost:
        node = ", on another node: its log says why" if placed.nodes > 1 else ""
        return f"{who} has lost another process{node}: {cause}\nIts own log: {log}\n{AGAIN}"
    return f"{who} failed: {cause}\nIts log: {log}\n{AGAIN}"


@dataclass
class Asked:
    """The first signal that asks this process to end: it is passed on, and the processes end by themselves."""

    number: int | None = None  # of the signal; None before one
    pass_on: Callable[[int], None] | None = None  # passes it to the processes; None before they start

    def serve(self, number: int, frame: FrameType | None) -> None:
        """Serve a signal: a second one ends at once."""
        if self.number is not None or self.pass_on is None:
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)
        self.number = number
        self.pass_on(number)


def launch(placed: Placement, arguments: Sequence[str], written: Config) -> int:
    """Run ``camex-ft`` with `arguments` in all processes of this node, after checking the configuration `written`.

    Returns:
        the exit code: 0, or 1 if a process failed, whose failure is then printed.

    Raises:
        UserError: the configuration is wrong, or a process found the user's input wrong.
        KeyboardInterrupt, Stopped: this process was asked to end; all others have ended by then.
    """
    show(placed)
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
    """Run ``camex-ft`` with `arguments` in all processes of a node; return its exit code.

    The command that starts them is printed, quoted for a shell. The output of the first process is shown; that of each
    goes to files in `logs`, a new folder.

    Raises:
        UserError: a process reported a mistake of the user.
        KeyboardInterrupt, Stopped: this process was asked to end; all others have ended by then.
    """
    variables = environment(placed)
    command = command_line(placed, arguments, logs=logs)
    print(f"{placed}; logs: {logs}")
    prefix = ["env", *(f"{name}={value}" for name, value in variables.items())] if variables else []
    print(shlex.join([*prefix, *command]), flush=True)
    try:
        logs.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"output.dir: {logs} cannot be written: {error.strerror or error}") from error
    with _signals() as asked:
        launched = Launched(command, variables)
        asked.pass_on = launched.ask
        streams = STREAMS if placed.node == 0 else ()
        tails = [Tail(logs, f"{name}.log", getattr(sys, name)) for name in streams]
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
    failures = find_failures([report for report in launched.reports if "text" in report], printed)
    message = describe(failures, placed=placed, logs=logs, code=code, printed=printed)
    if failures and failures[0].user_error:
        raise UserError(message)
    print(f"error: {printable(message)}", file=sys.stderr)
    return 1


class Launched:
    """The launcher, with its output and the reports of its processes.

    Attributes:
        process: the launcher.
        reports: of processes that failed, sent on the socket that is their standard input.
        printed: last lines of the launcher's output.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        own = {
            "PYTHONUNBUFFERED": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN),
            rank.PARENT: "stdin",
            provenance.COMMAND: provenance.command_line(),  # the command of the record
        }
        # SLURM's warning before the time is up would end torch's launcher, which has no handler for it
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
        """The step that the processes saved on a signal; None if they were not in training."""
        return next((report["step"] for report in self.reports if report.get("step") is not None), None)

    def ask(self, number: int) -> None:
        """Pass a signal on to the processes."""
        with suppress(OSError):
            self.socket.sendall(bytes([number]))

    def end(self) -> None:
        """End the launcher and, by the end of their standard input, all processes; signals are ignored meanwhile."""
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
    """Shows what the first process of this node adds to one of its log files, unchanged, for progress bars."""

    def __init__(self, logs: Path, name: str, to: IO[str]) -> None:
        self.logs, self.name, self.to = logs, name, to
        self.file: BinaryIO | None = None
        self.decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self.last = "\n"

    def show(self) -> None:
        """Write what has been added since the last call."""
        if self.file is None:
            paths = sorted(self.logs.glob(f"*/attempt_*/0/{self.name}"))
            self.file = paths[-1].open("rb") if paths else None
        if self.file is not None:
            self._write(self.decode(self.file.read()))

    def close(self) -> None:
        """Show the rest, end the line and close the file."""
        self.show()
        self._write("\n" if self.last != "\n" else "")
        if self.file is not None:
            self.file.close()

    def _write(self, text: str) -> None:
        self.last = text[-1:] or self.last
        with suppress(BrokenPipeError):  # nobody reads the output any more: the run goes on
            self.to.write(text)
            self.to.flush()


@contextmanager
def _signals() -> Iterator[Asked]:
    """Serve signals that ask to end while the body runs; restore the handlers afterwards."""
    asked = Asked()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, asked.serve)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
