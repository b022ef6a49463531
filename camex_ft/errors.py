"""Errors that are the user's to mend, and the nearest-name hint that goes with them."""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Callable, Iterable

from camex_ft.escaping import printable


class UserError(Exception):
    """The user's input is wrong: printed as it is, without a traceback, and the exit code is 2."""


class FunctionChanged(UserWarning):
    """The upcycled model does not compute what the dense model computes."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the valid name closest to `name`, or an empty string."""
    match = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


def guard(command: Callable[[], object]) -> int:
    """Call `command` and return the exit code: 2 for a `UserError`, 1 for any other error, each with its message."""
    try:
        command()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        print(
            "\nThis is a fault of camex_ft, not of your input. Please report it with the lines above, your YAML file "
            "and the output of `camex-ft doctor`.",
            file=sys.stderr,
        )
        return 1
    return 0
