"""Which process failed first, by what, and how that is told."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from camex_ft.launching.placement import Placement

AGAIN = "The same command goes on from the last checkpoint."
# The report that torch's launcher ends with: one such block a process that failed.
BLOCK = re.compile(r"^ +rank +: (\d+) \(local_rank: (\d+)\)\n +exitcode +: (-?\d+) ", flags=re.MULTILINE)
# Signals that a process gets because another one failed: from the launcher, or from a backend that gives up.
FOLLOWING = (signal.SIGTERM, signal.SIGABRT)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A process that failed.

    Attributes:
        local: its rank on this node.
        code: its exit code; minus the signal's number where a signal ended it; None where that is not known.
        text: what it says itself.
        user_error: whether that is a `UserError`.
        lost: whether it only says that another process is gone.
        time: when it said so, in seconds; 0 where it said nothing.
        log: the file with its standard error.
    """

    local: int
    code: int | None = None
    text: str = ""
    user_error: bool = False
    lost: bool = False
    time: float = 0.0
    log: Path

    @property
    def order(self) -> tuple[int, float, int]:
        """Sorts causes before what follows of them: signals, then what was said first, then who lost another."""
        if not self.text and self.code is not None and self.code < 0 and -self.code not in FOLLOWING:
            return (0, 0.0, self.local)
        if self.text:
            return (2 if self.lost else 1, self.time, self.local)
        return (3, 0.0, self.local)

    def __str__(self) -> str:
        """How it ended, in words."""
        if self.text:
            return self.text
        if self.code is None or self.code >= 0:
            return f"exit code {self.code}"
        name = signal.Signals(-self.code).name
        return f"ended by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")


def find_failures(logs: Path, *, launcher: Path) -> list[Failure]:
    """Return the processes of this node that failed, the cause first.

    Args:
        logs: the folder that torch's launcher wrote to: ``<any>/attempt_<n>/<local rank>/``.
        launcher: what the launcher printed.
    """
    printed = launcher.read_text(encoding="utf-8", errors="replace") if launcher.is_file() else ""
    codes = {int(local): int(code) for _, local, code in BLOCK.findall(printed)}
    found = []
    for folder in sorted(logs.glob("*/attempt_*/*")):
        if not folder.name.isdigit():
            continue
        local, said = int(folder.name), _read(folder / "error.json")
        if said or local in codes:
            found.append(Failure(local=local, code=codes.get(local), log=folder / "stderr.log", **said))
    return sorted(found, key=lambda failure: failure.order)


def _read(file: Path) -> dict[str, Any]:
    """Return what a process said in its error file: ours, or one that torch wrote."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if "camex_ft" in told:
        return dict(told["camex_ft"])
    message = told.get("message", "")
    return {"text": str(message.get("message", "") if isinstance(message, dict) else message)}


def describe(failures: Sequence[Failure], *, placed: Placement, logs: Path, code: int) -> str:
    """Return what to tell of failures, the cause first in them.

    Args:
        failures: see `find_failures`.
        placed: where the processes were.
        logs: the folder of all that they printed.
        code: of the launcher.
    """
    if not failures:
        return f"the processes ended with exit code {code} and none says why: see {logs}\n{AGAIN}"
    cause = failures[0]
    who = f"rank {placed.first + cause.local} of {placed.all}"
    if cause.user_error:
        return f"{cause.text}\n({who}; {cause.log.parent})"
    return f"{who} failed: {cause}\nIts log: {cause.log}\n{AGAIN}"
