"""One cell in a process or a job: ``python -m camex_ft.compare.worker`` reads on standard input which cell to run.

The first line of standard input is a request in JSON (`running.request`). Its end is the parent's end: then this
process leaves at once, so that it does not run a cell that the next call would start again. Progress goes to standard
output, a line of JSON each; whatever else is printed goes to standard error. A `Job` runs the same on a cluster.

Light to import: a job sets variables before torch reads them, and the parent may leave while libraries load.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from camex_ft.utils.errors import INTERRUPTED, guard

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission
    from transformers import TrainerCallback

SECONDS = 0.5  # between two lines of progress


def main() -> int:
    """Run the cell that standard input names; return the exit code."""
    request = json.loads(sys.stdin.readline())
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    return perform(request, lambda line: print(json.dumps(line), file=out, flush=True))


def _leave_with_the_parent() -> None:
    while os.read(0, 1024):
        continue
    os._exit(INTERRUPTED)


def perform(request: Mapping[str, Any], tell: Callable[[dict[str, Any]], None] | None = None) -> int:
    """Run the cell of a request and return the exit code; errors go to standard error.

    `tell` is called with the step and the number of steps, every now and then.
    """
    from camex_ft.config import load_config
    from camex_ft.results.run_folder import full_disk
    from camex_ft.run import pipeline

    # the command of the record: the one that runs the cell alone
    sys.argv = ["camex-ft", "run", request["config"], *request["overrides"]]

    def work() -> None:
        config = load_config(request["config"], request["overrides"])
        callbacks = () if tell is None else (_progress(tell),)
        with full_disk(config.output.dir):
            pipeline.run(config, force=request["force"], callbacks=callbacks)

    return guard(work)


def _progress(tell: Callable[[dict[str, Any]], None]) -> TrainerCallback:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """Tells the step of the training, at most every `SECONDS`."""

        reported = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Tell the step."""
            if time.monotonic() - self.reported > SECONDS:
                self.reported = time.monotonic()
                tell({"step": state.global_step, "steps": state.max_steps})

    return Progress()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A cell as a job of submitit, which pickles it and calls it on a node."""

    request: Mapping[str, Any]  # the cell: see `running.request`
    environment: Mapping[str, str] = field(default_factory=dict)  # variables to set first

    def __call__(self) -> None:
        """Run the cell; leave with its exit code where it failed, so that the cluster counts the job as failed."""
        os.environ.update(self.environment)
        code = perform(self.request)
        if code:
            sys.exit(code)

    def checkpoint(self) -> DelayedSubmission:
        """Return the job to submit again when its time is up or its node is lost: it resumes from its checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(replace(self, request={**self.request, "force": False}))


if __name__ == "__main__":
    sys.exit(main())
