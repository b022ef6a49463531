"""Forks runs off a process that has imported everything: each is a ``camex-ft run`` without the seconds of imports.

Standard input: a line of JSON a run, {"arguments": [...], "log": path}. Standard output: {"pid": ...}, and when it has
ended {"status": as waitpid tells it}.
"""

from __future__ import annotations

import json
import os
import sys

import camex_ft.cli
import camex_ft.run.pipeline
from camex_ft.utils.errors import guard


def run(arguments: list[str], log: str) -> None:
    """Be that run, and leave."""
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["camex-ft", *arguments]
    try:
        code = guard(camex_ft.cli.app)
    except SystemExit as left:
        code = int(left.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Serve until standard input ends."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(asked["arguments"], asked["log"])
        print(json.dumps({"pid": pid}), flush=True)
        print(json.dumps({"status": os.waitpid(pid, 0)[1]}), flush=True)


if __name__ == "__main__":
    main()
