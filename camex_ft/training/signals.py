"""Signals that ask a run to end: at once, or in training after the step under way, once that is saved.

The first signal in training is noted, and the Trainer asks for it (`noted`); a second one ends at once. Elsewhere, as
while data are prepared, the first one does. Light to import.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

# SLURM's warning before the time is up may be any; SIGUSR1 is the usual one.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
WAIT = "{}: ends after the step under way and its evaluation, and saves; once more ends at once\n"


class Stopped(BaseException):
    """A signal asks this process to end.

    Attributes:
        number: of the signal.
        step: the step that was saved for it; None where none was.
    """

    def __init__(self, number: int, step: int | None = None) -> None:
        super().__init__(number, step)
        self.number, self.step = number, step

    @property
    def code(self) -> int:
        """The exit code by which a shell knows it."""
        return 128 + self.number

    def __str__(self) -> str:
        """The signal's name."""
        return signal.Signals(self.number).name


@dataclass
class _Asked:
    waits: bool = False  # training is under way, and ends by itself
    number: int | None = None


_asked = _Asked()  # signals belong to the process: so does what becomes of them


def noted() -> int | None:
    """Return the signal that asks training to end, or None."""
    return _asked.number


def note(number: int) -> bool:
    """Ask training to end; return whether there is training that will."""
    if not _asked.waits or _asked.number is not None:
        return False
    _asked.number = number
    with suppress(OSError):  # not print: a handler may come in the middle of another one
        os.write(2, WAIT.format(signal.Signals(number).name).encode())
    return True


@contextmanager
def postponed() -> Iterator[None]:
    """Let signals wait while the body, training, runs.

    Raises:
        Stopped: at its end, where one was noted that it did not come to serve.
    """
    outer, _asked.waits = _asked.waits, True
    try:
        yield
        if _asked.number is not None and not outer:
            raise Stopped(_asked.number)
    finally:
        _asked.waits = outer
        if not outer:
            _asked.number = None


@contextmanager
def listening(numbers: Sequence[int] = SIGNALS) -> Iterator[None]:
    """Serve signals while the body runs, then as they were; nothing outside of the main thread.

    Raises:
        Stopped: a signal asks to end at once. KeyboardInterrupt: SIGINT does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _serve) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(number: int, frame: FrameType | None) -> None:
    if note(number):
        return
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(number)
