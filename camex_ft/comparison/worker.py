"""One cell in a process of its own: ``python -m camex_ft.comparison.worker``, told on standard input what to run.

The first line of standard input is a request in JSON. Its end is the parent's: then this process leaves at once, so
that nothing runs on that the next call would start again. Progress goes to standard output, a line of JSON each;
whatever else is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from camex_ft import pipeline
from camex_ft.config import load_config
from camex_ft.errors import guard

INTERRUPTED = 130
SECONDS = 0.5  # between two lines of progress


class Progress(TrainerCallback):
    """Tells how far training is, every now and then."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self.tell, self.told = tell, 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the step."""
        if time.monotonic() - self.told > SECONDS:
            self.told = time.monotonic()
            self.tell({"step": state.global_step, "steps": state.max_steps})


def main() -> int:
    """Run what standard input asks for; return the exit code."""
    request = json.loads(sys.stdin.readline())
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()

    def tell(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=out, flush=True)

    return perform(request, Progress(tell))


def perform(request: Mapping[str, Any], *callbacks: TrainerCallback) -> int:
    """Run the cell of a request (`running.request`) and return the exit code; what is wrong goes to standard error."""

    def work() -> None:
        config = load_config(request["config"], request["overrides"])
        pipeline.run(config, force=request["force"], callbacks=callbacks)

    return guard(work)


def _leave_with_the_parent() -> None:
    while os.read(0, 1024):
        continue
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
