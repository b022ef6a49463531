"""Whole runs through accelerate's launcher: the record of several processes is that of one, and any number goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
STEPS = 20
SETTINGS = [
    "profile=embedded",
    "task.name=sst2",
    "data.train_rows=240",
    "data.eval_rows=65",  # the last batch is not full, in any process
    "merging.experts=4",
    "routing.noise=false",
    "training.optim=sgd",  # Adam divides by the size of gradients, and rounding decides about those near 0
    "training.learning_rate=0.01",
    "training.max_grad_norm=0",
    "training.global_batch_size=24",
    "training.logging_steps=1",
    "training.eval_strategy=steps",
    "training.eval_steps=10",
    "training.save_strategy=steps",
    "training.save_steps=10",
    "training.use_cpu=true",
]
# Of the run itself, not of what it computes. Floating operations are counted with each process's padding.
OWN = ("run", "cost", "config.output", "environment.dirty", "environment.commit")
CLOSE = 1e-5


def command(folder: Path, protocol: str, *more: str) -> list[str]:
    given = [f"merging.protocol={protocol}", f"output.dir={folder}"]
    return [sys.executable, "-m", "camex_ft", "run", "glue", *SETTINGS, *given, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(folder: Path, protocol: str, *more: str) -> Path:
    """Run to the end, and return the run's folder."""
    done = subprocess.run(
        command(folder, protocol, *more),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return found(folder)


def found(folder: Path) -> Path:
    (only,) = (folder / "runs").iterdir()
    return only


def record(path: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((path / "record.json").read_text(encoding="utf-8"))
    return made


def differences(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """Yield the keys at which two records differ, numbers by more than CLOSE."""
    if name in OWN:
        return
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in one.keys() | other.keys():
            yield from differences(one.get(key), other.get(key), f"{name}.{key}".lstrip("."))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from differences(left, right, f"{name}[{i}]")
    elif isinstance(one, float) and isinstance(other, float):
        if abs(one - other) > CLOSE:
            yield f"{name}: {one} and {other}"
    elif one != other:
        yield f"{name}: {one} and {other}"


def assert_same(one: Path, other: Path) -> None:
    assert list(differences(record(one), record(other))) == []
    weights, others = (load_file(path / "model" / "model.safetensors") for path in (one, other))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=0, atol=CLOSE, msg=name)
    losses = [
        [json.loads(line).get("loss") for line in (path / "history.jsonl").read_text().splitlines()]
        for path in (one, other)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=CLOSE) and len(losses[0]) >= STEPS


@pytest.fixture(scope="module", params=["ties-ca", "smoe", "ep-camex"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A protocol, and its run in one process."""
    return request.param, run(tmp_path_factory.mktemp("alone"), request.param, f"training.max_steps={STEPS}")


@pytest.mark.parametrize(("count", "engine"), [(2, "ddp"), (3, "ddp"), (2, "fsdp"), (3, "fsdp")])
def test_the_record_of_several_processes_is_that_of_one(
    count: int, engine: str, alone: tuple[str, Path], tmp_path: Path
) -> None:
    protocol, one = alone
    several = run(tmp_path, protocol, f"training.max_steps={STEPS}", "--cpus", str(count), "--engine", engine)
    assert several.name == one.name
    assert_same(one, several)
    cost = record(several)["cost"]
    assert (cost["processes"], cost["engine"]) == (count, engine)
    assert record(several)["run"]["command"].endswith(f"--cpus {count} --engine {engine}")


def test_a_run_that_was_killed_goes_on_with_any_number_of_processes(tmp_path: Path) -> None:
    """Killed under FSDP with two processes; gone on with by one, and by three."""
    steps = "training.max_steps=60"
    killed = subprocess.Popen(
        command(tmp_path / "killed", "ties-ca", steps, "--cpus", "2", "--engine", "fsdp"),
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not list((tmp_path / "killed").glob("runs/*/checkpoints/checkpoint-10/trainer_state.json")):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    time.sleep(3)  # the processes leave when their parent is gone
    shutil.copytree(tmp_path / "killed", tmp_path / "again")
    one = run(tmp_path / "whole", "ties-ca", steps)
    for folder, more in (("killed", ()), ("again", ("--cpus", "3", "--engine", "fsdp"))):
        resumed = run(tmp_path / folder, "ties-ca", steps, *more)
        assert record(resumed)["run"]["resumed"] >= 10
        assert_same(one, resumed)
