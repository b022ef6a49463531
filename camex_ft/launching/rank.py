"""What a process of a run does that was started as one of several: say why it fails, in a file, and leave at once."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from camex_ft.errors import UserError, guard

PARENT = "CAMEX_FT_PARENT"  # "stdin": the end of standard input is the end of the process that launched
FILE = "TORCHELASTIC_ERROR_FILE"  # torch's launcher sets it, and reads what is written there
INTERRUPTED = 130
# How torch's backends say that another process is gone.
LOST = (
    "DistBackendError",
    "DistNetworkError",
    "Connection closed by peer",
    "Connection reset by peer",
    "gloo/",
)


def inside(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether this is one of several processes that torch's launcher has started."""
    return FILE in variables


def run(command: Callable[[], object]) -> int:
    """Call `command` and return the exit code, as `errors.guard` does; a failure is written to torch's error file too.

    A failure leaves from here, without what Python runs at exit: it could wait for the other processes.
    """
    if os.environ.get(PARENT) == "stdin":
        threading.Thread(target=_leave_with_the_parent, daemon=True).start()

    def reporting() -> None:
        try:
            command()
        except Exception as error:
            _report(error)
            if isinstance(error, UserError) and PARENT in os.environ and os.environ.get("RANK") == "0":
                _leave(2)  # the parent shows this output, and will say it
            if lost(error):
                print(
                    f"rank {os.environ.get('RANK')} has lost another process: {last_line(error)}",
                    file=sys.stderr,
                )
                _leave(1)
            raise

    code = guard(reporting)
    if code:
        _leave(code)
    return code


def lost(error: BaseException) -> bool:
    """Whether an error only says that another process is gone."""
    text = f"{type(error).__name__}: {error}"
    return not isinstance(error, UserError) and any(words in text for words in LOST)


def last_line(error: BaseException) -> str:
    """Return an error in a line: its kind and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def _report(error: Exception) -> None:
    """Write the error in the form that torch's launcher reads, and what only this package does under ``camex_ft``."""
    told = {
        "message": {
            "message": last_line(error),
            "extraInfo": {"py_callstack": traceback.format_exc(), "timestamp": str(int(time.time()))},
        },
        "camex_ft": {
            "text": str(error) if isinstance(error, UserError) else last_line(error),
            "user_error": isinstance(error, UserError),
            "lost": lost(error),
            "time": time.time(),
        },
    }
    try:
        Path(os.environ[FILE]).write_text(json.dumps(told), encoding="utf-8")
    except OSError as why:  # a full disk, perhaps the very failure: then the log has to do
        print(f"error: {error} (and {os.environ[FILE]} cannot be written: {why})", file=sys.stderr)


def _leave(code: int) -> None:
    with_streams = (sys.stdout, sys.stderr)
    for stream in with_streams:
        try:
            stream.flush()
        except OSError:
            continue
    os._exit(code)


def _leave_with_the_parent() -> None:
    while os.read(0, 1024):
        continue
    os._exit(INTERRUPTED)
