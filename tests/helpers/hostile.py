"""Names that somebody may hope lead elsewhere, and an end to what hangs."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import strategies as st


class Hanging(BaseException):
    """Nothing has come of it; no handler of errors takes this for one."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """End the body where it hangs, as on a pipe that nobody writes into."""

    def stop(*_: object) -> None:
        raise Hanging(f"nothing has come of it in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


EVIL = [
    "../../x",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a\0b",
    "a\nb",
    "$(id)",
    "`id`",
    "'; rm -rf ~; '",
    '"',
    "-rf",
    "--help",
]
EVIL += [
    "~root",
    "C:\\x",
    "..\\..\\x",
    "con",
    "a" * 400,
    "\u202e",
    "..%2f..",
    "é/ü",
    "new:../../x",
    "package:../../x",
    *(
        "..;/",
        "...",
        "x.",
        "x ",
        " ",
        ".hidden",
        "a" * 5000,
        "é" * 300,
        "\ud800",
        "a/../../b",
        "x\x1b[2J",
        "LOGS",
    ),
]
names = st.sampled_from(EVIL) | st.text(max_size=30)
