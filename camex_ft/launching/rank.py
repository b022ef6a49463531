"""One of several processes of a run: it reports why it fails, and leaves at once.

Standard input is then a socket to the process that launched: its end is that process's end, and what goes wrong is
told on it, which works on a full disk too. A byte on it is the number of a signal that asks the run to end: one of the
processes reads it, and in training tells the others.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from camex_ft.training.signals import SIGNALS, note
from camex_ft.utils.errors import UserError, guard

PARENT = "CAMEX_FT_PARENT"  # set where standard input is that socket
FILE = "TORCHELASTIC_ERROR_FILE"  # torch's launcher sets it, and reads what is written there
INTERRUPTED = 130
MOST = 8000  # characters told: so short a message is not mixed with that of another process
# How torch's backends say that another process is gone.
LOST = (
    "DistBackendError",
    "DistNetworkError",
    "Connection closed by peer",
    "Connection reset by peer",
    "gloo/",
)


def inside(variables: Mapping[str, str] = os.environ) -> bool:
    """Return whether this is one of several processes that torch's launcher has started."""
    return FILE in variables


def signals(variables: Mapping[str, str] = os.environ) -> tuple[int, ...]:
    """Return the signals that a process of a run is to serve itself.

    One of several leaves SIGTERM alone: torch's launcher sends it where another process is gone, which this one would
    wait for.
    """
    return tuple(n for n in SIGNALS if not inside(variables) or n not in (signal.SIGTERM, signal.SIGINT))


def run(command: Callable[[], object]) -> int:
    """Call `command` and return the exit code, as `errors.guard` does, if it is 0.

    A failure is told, and the process leaves from here without what Python runs at exit: that could wait for the
    other processes, which wait for this one.
    """
    if PARENT in os.environ:
        threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    try:
        code = guard(lambda: _reporting(command))
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except OSError:  # there is no room for what is printed
        code = 1
    if code:
        _leave(code)
    return code


def _reporting(command: Callable[[], object]) -> None:
    try:
        command()
    except SystemExit as left:  # the command line ends so, also where all is well
        if left.code:
            _report(left)
        raise
    except Exception as error:
        _report(error)
        if isinstance(error, UserError) and PARENT in os.environ and os.environ.get("RANK") == "0":
            _leave(2)  # the parent shows this output, and says the error itself
        if lost(error):
            with suppress(OSError):
                print(f"another process is gone: {in_a_line(error)}", file=sys.stderr)
            _leave(1)
        raise


def lost(error: BaseException) -> bool:
    """Return whether an error only says that another process is gone."""
    text = f"{type(error).__name__}: {error}"
    return not isinstance(error, UserError) and any(words in text for words in LOST)


def in_a_line(error: BaseException) -> str:
    """Return an error's kind and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def _report(error: BaseException) -> None:
    """Tell the parent, and write the error in the form that torch's launcher reads."""
    user = isinstance(error, UserError)
    told = {
        "rank": int(os.environ.get("RANK", "0")),
        "local": int(os.environ.get("LOCAL_RANK", "0")),
        "text": (str(error) if user else in_a_line(error))[:MOST],
        "user_error": user,
        "lost": lost(error),
        "time": time.time(),
    }
    extra = {"py_callstack": traceback.format_exc(), "timestamp": str(int(time.time()))}
    with suppress(OSError):
        if PARENT in os.environ:
            os.write(0, (json.dumps(told) + "\n").encode())
    with suppress(OSError):
        file = json.dumps({"message": {"message": in_a_line(error), "extraInfo": extra}})
        Path(os.environ[FILE]).write_text(file, encoding="utf-8")


def tell_step(step: int | None) -> None:
    """Tell the parent which step was saved before this process ends as it was asked to."""
    if PARENT in os.environ and step is not None:
        with suppress(OSError):
            os.write(0, (json.dumps({"step": step}) + "\n").encode())


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _leave_with_the_parent() -> None:
    with suppress(OSError):
        while asked := os.read(0, 1024):
            if not note(asked[-1]):
                os._exit(128 + asked[-1])  # not in training: at once, and the launcher ends the others
    os._exit(INTERRUPTED)
