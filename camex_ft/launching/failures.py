"""The failure that came first among the processes of a run, in words."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from camex_ft.launching.placement import Placement

AGAIN = "The same command goes on from the last checkpoint."
# The report that torch's launcher ends with: one such block a process that failed.
BLOCK = re.compile(r"^ +rank +: (\d+) \(local_rank: (\d+)\)\n +exitcode +: (-?\d+) ", flags=re.MULTILINE)
# Signals that a process gets because another one failed: from the launcher, or from a backend that gives up.
FOLLOWING = (signal.SIGTERM, signal.SIGABRT)
# As much of what the launcher printed is shown, where nothing else says why.
LINES = 5


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A process that failed.

    Attributes:
        rank, local: its rank among all, and on this node.
        code: its exit code; minus the signal's number where a signal ended it; None where that is not known.
        text: what it says itself.
        user_error: whether that is a `UserError`.
        lost: whether it only says that another process is gone.
        time: when it said so, in seconds; 0 where it said nothing.
    """

    rank: int
    local: int
    code: int | None = None
    text: str = ""
    user_error: bool = False
    lost: bool = False
    time: float = 0.0

    @property
    def order(self) -> tuple[int, float, int]:
        """Sorts causes before what follows of them."""
        if self.text:
            return (3 if self.lost else 1, self.time, self.rank)
        if self.code is None or self.code >= 0:
            return (2, 0.0, self.rank)
        return (4 if -self.code in FOLLOWING else 0, 0.0, self.rank)

    def __str__(self) -> str:
        """Return how it ended, in words."""
        if self.text:
            return self.text
        if self.code is None or self.code >= 0:
            return f"exit code {self.code}"
        name = signal.Signals(-self.code).name
        return f"ended by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")


def find_failures(reports: Iterable[Mapping[str, Any]], printed: str) -> list[Failure]:
    """Return the processes of this node that failed, the cause first.

    Args:
        reports: what processes have told themselves, see `rank`.
        printed: by torch's launcher, which knows their exit codes.
    """
    found = {report["rank"]: Failure(**report) for report in reports}
    for words in BLOCK.findall(printed):
        number, local, code = map(int, words)
        found[number] = replace(found.get(number, Failure(rank=number, local=local)), code=code)
    return sorted(found.values(), key=lambda failure: failure.order)


def log_of(failure: Failure, logs: Path) -> Path:
    """Return the file with the standard error of a process, or the folder of all where it is not there."""
    found = sorted(logs.glob(f"*/attempt_*/{failure.local}/stderr.log"))
    return found[-1] if found else logs


def describe(failures: Sequence[Failure], *, placed: Placement, logs: Path, code: int, printed: str) -> str:
    """Return what to tell of failures, the cause first in them.

    Args:
        failures: see `find_failures`.
        placed: where the processes were.
        logs: the folder of all that they printed.
        code: of the launcher.
        printed: by the launcher.
    """
    if not failures:
        last = "".join(f"\n  {line}" for line in printed.strip().splitlines()[-LINES:])
        ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
        return f"the launcher {ended}, and no process says why. Logs: {logs}{last}\n{AGAIN}"
    cause = failures[0]
    who, log = f"rank {cause.rank} of {placed.all}", log_of(cause, logs)
    if cause.user_error:
        return f"{cause.text}\n({who}; its log: {log})"
    if cause.lost:
        node = ", on another node: its log says why" if placed.nodes > 1 else ""
        return f"{who} has lost another process{node}: {cause}\nIts own log: {log}\n{AGAIN}"
    return f"{who} failed: {cause}\nIts log: {log}\n{AGAIN}"
