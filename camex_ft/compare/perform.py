"""Run one cell in this process, and tell how far it is: for `worker` and for jobs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from camex_ft.config import load_config
from camex_ft.results.disk import full_disk
from camex_ft.run import pipeline
from camex_ft.utils.errors import guard

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


def perform(request: Mapping[str, Any], *callbacks: TrainerCallback) -> int:
    """Run the cell of a request (`running.request`) and return the exit code; what is wrong goes to standard error."""
    # what the record shows as its command: the one that runs the cell alone
    sys.argv = ["camex-ft", "run", request["config"], *request["overrides"]]

    def work() -> None:
        config = load_config(request["config"], request["overrides"])
        with full_disk(config.output.dir):
            pipeline.run(config, force=request["force"], callbacks=callbacks)

    return guard(work)
