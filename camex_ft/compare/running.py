"""Run cells, one process a device (or a few on the CPU), and follow the state of each."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camex_ft.utils import system
from camex_ft.utils.errors import exit_reason

if TYPE_CHECKING:
    from camex_ft.compare.cells import Cell

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
POLL = 0.2
COMMAND = (sys.executable, "-m", "camex_ft.compare.worker")
THREADS = "OMP_NUM_THREADS"
DEVICES = "CUDA_VISIBLE_DEVICES"
Process = Any  # a `subprocess.Popen`, or a job with its methods poll, kill and wait
ERROR = re.compile(
    r"[A-Za-z][\w.]*(:|$)"
)  # the line of a traceback that names the error: package.SomeError: words


@dataclass
class CellState:
    """State of a cell."""

    cell: Cell
    name: str = ""  # of its run's folder
    status: str = WAITING
    reason: str = ""  # of its failure
    log: Path | None = None  # that its process prints to
    started: float = 0.0  # monotonic
    seconds: float | None = None  # that it took
    share: float = 0.0  # of the training steps done, 0 to 1
    before: bool = False  # it was done before this call

    @property
    def left(self) -> float | None:
        """Seconds that it will still take, from the pace so far; None where that is not known."""
        if self.status != RUNNING or not self.share:
            return None
        return (time.monotonic() - self.started) * (1 - self.share) / self.share


@dataclass
class Slot:
    """A device for one process: a GPU by its name for CUDA, or a share of the CPU (None)."""

    device: str | None
    environment: dict[str, str]
    process: Process | None = None
    state: CellState | None = None


def slots(jobs: int | None = None, *, tiny: bool = True) -> list[Slot]:
    """Return the places that cells can run in at the same time.

    Args:
        jobs: how many; by default one a visible GPU. On the CPU, one a core for tiny models, which gain nothing by
            threads, and else one, for want of memory; the cores are divided among them, unless OMP_NUM_THREADS says
            otherwise.
        tiny: whether all models are the package's own.
    """
    gpus = visible_gpus()
    if gpus:
        names = (gpus * (jobs or 1))[: jobs or len(gpus)]
        return [Slot(device=name, environment={DEVICES: name}) for name in names]
    cores = system.cores()
    count = jobs or (cores if tiny else 1)
    threads = {} if THREADS in os.environ else {THREADS: str(max(cores // count, 1))}
    return [Slot(device=None, environment=threads) for _ in range(count)]


def visible_gpus() -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES knows the GPUs that this process may use."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = [name.strip() for name in os.environ.get(DEVICES, "").split(",") if name.strip()]
    return named or [str(n) for n in range(torch.cuda.device_count())]


@dataclass
class Runner:
    """Runs waiting cells; `close` must be called in any case, so that no process is left."""

    states: Sequence[CellState]  # of all cells
    slots: Sequence[Slot]  # places to run them in
    logs: Path  # folder of their logs
    force: bool = False  # run done cells again
    changed: Callable[[CellState], None] = lambda state: None  # called after every change of a cell's status
    _waiting: deque[CellState] = field(default_factory=deque)

    def run(self, tick: Callable[[], None] = lambda: None) -> None:
        """Run every waiting cell; `tick` is called a few times a second."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self._waiting = deque(state for state in self.states if state.status == WAITING)
        try:
            while self._waiting or any(slot.process for slot in self.slots):
                for slot in self.slots:
                    self._look_after(slot)
                tick()
                time.sleep(POLL)
        finally:
            self.close()

    def close(self) -> None:
        """End running processes: their checkpoints stay, and the next call resumes from them."""
        running = [slot.process for slot in self.slots if slot.process]
        for process in running:
            process.kill()
        for process in running:
            process.wait()

    def _look_after(self, slot: Slot) -> None:
        if slot.process is not None and slot.process.poll() is not None:
            self._ended(slot)
        if slot.process is None and self._waiting:
            state = self._waiting.popleft()
            slot.process = self.launch(slot, state)
            slot.state, state.status, state.started = state, RUNNING, time.monotonic()
            self.changed(state)

    def launch(self, slot: Slot, state: CellState) -> Process:
        """Start a cell and return its process; `state.log` is the file of its standard error."""
        state.log = self.logs / f"{state.name}.log"
        with state.log.open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **slot.environment},
                start_new_session=True,  # Ctrl-C is for this process, which ends the others itself
            )
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # it may be gone already; its exit code says why
            process.stdin.write(json.dumps(request(state.cell, self.force)) + "\n")
            process.stdin.flush()  # and stays open: its end would be ours
        threading.Thread(target=_listen, args=(process.stdout, state), daemon=True).start()
        return process

    def _ended(self, slot: Slot) -> None:
        process, state = slot.process, slot.state
        assert process is not None and state is not None and state.log is not None
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        state.seconds = time.monotonic() - state.started
        state.status = DONE if process.returncode == 0 else FAILED
        if state.status == FAILED:
            state.reason = why(process.returncode, state.log)
        slot.process = slot.state = None
        self.changed(state)


def request(cell: Cell, force: bool = False) -> dict[str, Any]:
    """Return the request that a process is sent to run a cell: see `worker.perform`."""
    return {"config": cell.config, "overrides": list(cell.overrides), "force": force}


def why(code: int, log: Path) -> str:
    """Return the reason that a process failed, on one line: its own message, or the signal that ended it."""
    if code < 0:
        return exit_reason(code)
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    for n, line in enumerate(lines):
        if line.startswith("error: "):
            return " ".join([line.removeprefix("error: "), *lines[n + 1 : n + 3]]).strip()
    said = [line for line in lines if line and not line.startswith("This is a fault of camex_ft")]
    if any(line.startswith("Traceback") for line in said):
        said = [line for line in said if ERROR.match(line)]
    return said[-1] if said else f"exit code {code}, without a message"


def _listen(lines: Iterable[str], state: CellState) -> None:
    try:
        for line in lines:
            progress = json.loads(line)
            state.share = progress["step"] / max(progress["steps"], 1)
    except ValueError:  # the pipe was closed, or a line cut short by a kill
        return
