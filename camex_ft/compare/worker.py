"""One cell in a process of its own: ``python -m camex_ft.compare.worker``, told on standard input what to run.

The first line of standard input is a request in JSON. Its end is the parent's: then this process leaves at once, so
that nothing runs on that the next call would start again. Progress goes to standard output, a line of JSON each;
whatever else is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

INTERRUPTED = 130


def main() -> int:
    """Run what standard input asks for; return the exit code."""
    request = json.loads(sys.stdin.readline())
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    from camex_ft.compare.perform import Progress, perform  # takes seconds, in which the parent may leave

    def tell(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=out, flush=True)

    return perform(request, Progress(tell))


def _leave_with_the_parent() -> None:
    while os.read(0, 1024):
        continue
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
