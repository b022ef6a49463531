"""One of several processes of a run: it reports its failure to the launching process, and exits at once.

Its standard input is a socket to the launching process. The end of the socket is the end of that process; failures are
reported on it, which works on a full disk too; and a byte on it is the number of a signal that asks the run to end,
which the process that reads it passes on to the others in training.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from camex_ft.training.signals import SIGNALS, note
from camex_ft.utils.errors import INTERRUPTED, UserError, guard

PARENT = "CAMEX_FT_PARENT"  # set if standard input is that socket
FILE = "TORCHELASTIC_ERROR_FILE"  # set by torch's launcher, which reads the file
MOST = 8000  # characters of a report: short enough not to be mixed with that of another process
# Words of torch's backends for the loss of another process.
LOST = re.compile(
    "DistBackendError|DistNetworkError|Connection closed by peer|Connection reset by peer|gloo/"
)


def inside(variables: Mapping[str, str] = os.environ) -> bool:
    """Return whether torch's launcher has started this process as one of several."""
    return FILE in variables


def signals(variables: Mapping[str, str] = os.environ) -> tuple[int, ...]:
    """Return the signals that a process of a run handles itself.

    One of several leaves SIGTERM to its default: torch's launcher sends it when another process is gone, for which
    saving would wait.
    """
    return tuple(n for n in SIGNALS if not inside(variables) or n not in (signal.SIGTERM, signal.SIGINT))


def run(command: Callable[[], object]) -> int:
    """Call `command` as `errors.guard` does, and return 0.

    A failure is reported, and the process exits from here without Python's exit handlers, which could wait for the
    other processes while these wait for this one.
    """
    if PARENT in os.environ:
        threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    try:
        code = guard(lambda: _reporting(command))
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except OSError:  # no disk space for the output
        code = 1
    if code:
        _leave(code)
    return code


def _reporting(command: Callable[[], object]) -> None:
    try:
        command()
    except SystemExit as left:  # the command line ends so, with code 0 too
        if left.code:
            _report(left)
        raise
    except Exception as error:
        _report(error)
        if isinstance(error, UserError) and PARENT in os.environ and os.environ.get("RANK") == "0":
            _leave(2)  # the parent prints the error itself
        if lost(error):
            with suppress(OSError):
                print(f"another process is gone: {in_a_line(error)}", file=sys.stderr)
            _leave(1)
        raise


def lost(error: BaseException) -> bool:
    """Return whether an error only says that another process is gone."""
    return not isinstance(error, UserError) and bool(LOST.search(f"{type(error).__name__}: {error}"))


def in_a_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__


def _report(error: BaseException) -> None:
    """Report an error to the parent, and write it in the form that torch's launcher reads."""
    user = isinstance(error, UserError)
    report = {
        "rank": int(os.environ.get("RANK", "0")),
        "local": int(os.environ.get("LOCAL_RANK", "0")),
        "text": (str(error) if user else in_a_line(error))[:MOST],
        "user_error": user,
        "lost": lost(error),
        "time": time.time(),
    }
    extra = {"py_callstack": traceback.format_exc(), "timestamp": str(int(time.time()))}
    _tell(report)
    with suppress(OSError):
        file = json.dumps({"message": {"message": in_a_line(error), "extraInfo": extra}})
        Path(os.environ[FILE]).write_text(file, encoding="utf-8")


def tell_step(step: int | None) -> None:
    """Report the step that was saved before this process ends on a signal."""
    if step is not None:
        _tell({"step": step})


def _tell(report: Mapping[str, object]) -> None:
    if PARENT in os.environ:
        with suppress(OSError):
            os.write(0, (json.dumps(report) + "\n").encode())


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
