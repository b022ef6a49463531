"""Errors in the user's input, exit codes, and hints at the nearest name."""

from __future__ import annotations

import difflib
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator

from camex_ft.utils.escaping import printable


class UserError(Exception):
    """The user's input is wrong: printed as it is, without a traceback, and the exit code is 2."""


class FunctionChanged(UserWarning):
    """The upcycled model does not compute what the dense model computes."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the valid name closest to `name`, or an empty string."""
    match = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


def among(name: str, valid: Collection[str]) -> str:
    """Return `nearest` and the list of valid names, for a message about a name that is not one of them."""
    return f"{nearest(name, valid)} Known: {', '.join(valid)}"


def exit_reason(code: int | None) -> str:
    """Return an exit code in words: minus a signal's number where a signal ended the process."""
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"ended by {name}" + (", perhaps because memory ran out" if name == "SIGKILL" else "")


INTERRUPTED = 130  # exit code after Ctrl-C
ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and torch have errors of their own; torch's writer does not pass the reason on: there is hardly another.
SAID = re.compile(r"No space left on device|Disk quota exceeded|File too large|os error (28|122|27)\b")
TORCH = re.compile(r"PytorchStreamWriter failed writing|inline_container\.cc.*unexpected pos")


def is_full(error: BaseException) -> bool:
    """Return whether an error, or one of its causes, is an out-of-space error."""
    return any(
        (isinstance(inner, OSError) and inner.errno in ERRNOS)
        or SAID.search(str(inner))
        or TORCH.search(str(inner))
        for inner in chain(error)
    )


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    inner: BaseException | None = error
    while inner is not None:
        yield inner
        inner = inner.__cause__ or inner.__context__


def reason_full(error: BaseException) -> str:
    """Return the first line of an out-of-space error."""
    cut = "a file of torch's was cut short"
    return cut if TORCH.search(str(error)) else str(error).strip().partition("\n")[0]


def guard(command: Callable[[], object]) -> int:
    """Call `command` and return the exit code: 2 for a `UserError` or a full disk, 1 for any other, with a message."""
    try:
        try:
            command()
        finally:
            _flush()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except Exception as error:
        if is_full(error):
            print(
                f"error: there is no room left to write: {reason_full(error)}. Make room and repeat the command: files "
                "that were there before are as they were",
                file=sys.stderr,
            )
            return 2
        traceback.print_exc()
        print(
            "\nThis is a fault of camex_ft, not of your input. Please report it with the lines above, your YAML file "
            "and the output of `camex-ft doctor`.",
            file=sys.stderr,
        )
        return 1
    return 0


def _flush() -> None:
    """Flush standard output, so that a full disk is noticed before the exit code is returned."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if is_full(error):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more
            raise
