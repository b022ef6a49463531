"""Runs that are ended from outside at chosen moments, and the comparison with one that nobody ended."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

STEPS = {"eval_strategy": "steps", "save_strategy": "steps"}
COMMON = {
    "max_steps": 12,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "disable_tqdm": True,
    "use_cpu": True,
}
# Protocols of different forms, each with evaluations, checkpoints and log lines that do not coincide.
CASES: dict[str, dict[str, Any]] = {
    "ties-ca": {
        **STEPS,
        "eval_steps": 2,
        "save_steps": 4,
        "logging_steps": 3.0,
        "gradient_accumulation_steps": 2,
    },
    "ep-camex": {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_steps": 5.0,
        "save_total_limit": 1,
    },
    "fisher": {
        "eval_strategy": "epoch",
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 5.0,
        "load_best_model_at_end": False,
        "train_sampling_strategy": "random",
    },
    "smoe": {**STEPS, "eval_steps": 3, "save_steps": 3, "logging_steps": 1.0, "optim": "adafactor"},
}
TIMES = ("runtime", "per_second", "preparation_time")
PHASES = ("preparation", "steps", "saving", "record")


def settings(output: Path, protocol: str) -> dict[str, Any]:
    """The configuration of a case."""
    experts: dict[str, Any] = {"protocol": protocol, "experts": 3}
    if protocol in ("ties-ca", "smoe"):
        experts["top_k"] = 2
    return {
        "profile": "embedded",
        "backbone": "embedded/bert",
        "task": {"suite": "glue", "name": "rte", "max_length": 48, "predict": True},
        "data": {"source": "embedded", "train_rows": 32, "eval_rows": 24},
        "merging": experts,
        "upcycle": {"layers": [0, 1] if protocol == "ep-camex" else [1]},
        "training": {**COMMON, **CASES[protocol]},
        "output": {"dir": str(output)},
    }


def write(output: Path, protocol: str, file: Path) -> Path:
    """Write the configuration of a case to `file`, and return that."""
    file.write_text(yaml.safe_dump(settings(output, protocol)))
    return file


def folder_of(output: Path) -> Path | None:
    """The run's folder, where there is one yet."""
    found = list((output / "runs").glob("*")) if (output / "runs").is_dir() else []
    return found[0] if found else None


class Runs:
    """Starts runs one after another, in children of a process that has imported everything."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).parents[1] / "durability" / "server.py")]
        own = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own
        )
        self._told()

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()

    def _told(self) -> dict[str, Any]:
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, "the server is gone"
        found: dict[str, Any] = json.loads(line)
        return found

    def start(self, config: Path, log: Path, *more: str) -> int:
        """Start a run and return its process."""
        assert self.server.stdin is not None
        asked = {"arguments": ["run", str(config), *more], "log": str(log)}
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        return int(self._told()["pid"])

    def running(self) -> bool:
        return not select.select([self.server.stdout], [], [], 0)[0]

    def end(self) -> int:
        """Wait for the end of the run and return its exit code; minus the signal that ended it."""
        return os.waitstatus_to_exitcode(self._told()["status"])

    def whole(self, config: Path, log: Path, *more: str) -> int:
        """Run to the end."""
        self.start(config, log, *more)
        return self.end()

    def killed(
        self, config: Path, log: Path, ready: Callable[[], bool], delay: float, number: int = signal.SIGKILL
    ) -> int:
        """Run, and send a signal `delay` seconds after it is `ready`; return the exit code."""
        process = self.start(config, log)
        while self.running() and not ready():
            time.sleep(0.0005)
        end = time.monotonic() + delay
        while self.running() and time.monotonic() < end:
            time.sleep(0.0005)
        if self.running():
            os.kill(process, number)
        return self.end()


def moment(phase: str, output: Path, draw: random.Random) -> tuple[Callable[[], bool], float]:
    """A random moment of a phase: what to wait for, and how long from then on, in seconds."""
    lines = _lines(output)

    def begun() -> bool:
        return _lines(output) > lines

    def saving() -> bool:
        folder = folder_of(output)
        return folder is not None and any((folder / "checkpoints").glob(".checkpoint-*.unfinished"))

    def closing() -> bool:
        folder = folder_of(output)
        return folder is not None and any(
            (folder / name).exists() for name in (".model.unfinished", "model", "predictions")
        )

    return {
        "preparation": (lambda: True, draw.uniform(0, 1.5)),
        "steps": (begun, draw.uniform(0, 1.0)),
        "saving": (saving, draw.uniform(0, 0.08)),
        "record": (closing, draw.uniform(0, 0.12)),
    }[phase]


def _lines(output: Path) -> int:
    folder = folder_of(output)
    with contextlib.suppress(OSError):
        if folder is not None:
            return (folder / "history.jsonl").read_bytes().count(b"\n")
    return 0


def outcome(output: Path) -> dict[str, Any]:
    """Everything that a run leaves, but for times, memory and where it went on from."""
    folder = folder_of(output)
    assert folder is not None
    record = json.loads((folder / "record.json").read_text())
    for name in ("started", "seconds", "resumed", "command"):
        record["run"].pop(name)
    for name in ("samples_per_second", "tokens_per_second", "peak_memory_mb"):
        record["cost"].pop(name)
    record["config"]["output"].pop("dir")
    for name in ("commit", "dirty"):  # somebody may commit meanwhile
        record["environment"].pop(name)
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    files = [
        path for name in ("model", "predictions") for path in (folder / name).rglob("*") if path.is_file()
    ]
    return {
        "record": record,
        "history": [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in lines],
        "files": {str(path.relative_to(folder)): _contents(path) for path in files},
        "left": sorted(path.name for path in folder.iterdir()),
    }


def _contents(path: Path) -> bytes:
    """A file's bytes; of a model's card without what names where it was made."""
    if path.name != "README.md":
        return path.read_bytes()
    ours = (b"| command |", b"| commit of camex_ft |")
    return b"\n".join(line for line in path.read_bytes().splitlines() if not line.startswith(ours))


def differences(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Where two outcomes differ."""
    if isinstance(one, list) and isinstance(other, list) and len(one) != len(other):
        yield f"{place}: {len(one)} entries and not {len(other)}: {[e for e in one if e not in other]}"
    elif isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from differences(one.get(key), other.get(key), f"{place}/{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for n, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{place}/{n}")
    elif one != other:
        yield f"{place}: {str(one)[:200]} is not {str(other)[:200]}"
