"""Several processes are one process: losses, weights, routing, metrics; checkpoints for any number of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed_training import ENGINES, SGD, deepspeed_file, distance, keep, make

PROTOCOLS = ("ties-ca", "smoe", "ep-camex", "dare-ca")
CLOSE = 1e-5  # float32, sums of a batch in another order, over 20 steps of SGD; measured: 6e-8
EXACT = 1e-9  # float64, 4 steps of AdamW, which enlarges what gradients near 0 differ by
WORKER = Path(__file__).with_name("worker.py")
Spawn = Callable[..., Path]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outcomes of every job in this process."""
    folder = tmp_path_factory.mktemp("alone")
    for protocol in PROTOCOLS:
        made = make(folder / protocol, protocol, **SGD)
        made.train()
        keep(made, folder / f"{protocol}.pt")
    made = make(folder / "saved", "ties-ca", double=True, max_steps=8)
    made.train()
    keep(made, folder / "save.pt")
    return folder


@pytest.fixture(scope="module")
def spawn(tmp_path_factory: pytest.TempPathFactory) -> Spawn:
    """Run jobs in processes of their own, and return where their outcomes are."""

    def run(count: int, engine: str, *jobs: str, folder: Path | None = None) -> Path:
        folder = folder or tmp_path_factory.mktemp(f"{engine}{count}")
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **ENGINES[engine]}
        if engine.startswith("zero"):
            environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(deepspeed_file(engine, folder))
        command = [sys.executable, *start, str(WORKER), str(folder), *jobs]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=250, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return folder

    return run


def read(file: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = torch.load(file, weights_only=True)
    return found


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any], tolerance: float) -> None:
    assert distance(one["weights"], other["weights"]) <= tolerance
    assert distance(one["routing"], other["routing"]) <= tolerance
    for key in ("lines", "metrics"):
        left, right = json.loads(one[key]), json.loads(other[key])
        left, right = ([left], [right]) if key == "metrics" else (left, right)
        assert len(left) == len(right) > 0
        for found, expected in zip(left, right, strict=True):  # a log rounds nothing: losses are float32
            assert found == pytest.approx(expected, abs=max(tolerance, 1e-6))
    assert json.loads(one["loads"]).keys() == json.loads(other["loads"]).keys()
    for layer, shares in json.loads(one["loads"]).items():
        assert shares == pytest.approx(json.loads(other["loads"])[layer], abs=1e-6)


@pytest.mark.parametrize(
    ("count", "engine"),
    [
        (2, "ddp"),
        (2, "fsdp"),
        pytest.param(3, "ddp", marks=pytest.mark.slow),
        pytest.param(3, "fsdp", marks=pytest.mark.slow),
        pytest.param(2, "zero2", marks=pytest.mark.slow),
        pytest.param(2, "zero3", marks=pytest.mark.slow),
    ],
)
def test_several_processes_train_as_one(count: int, engine: str, alone: Path, spawn: Spawn) -> None:
    """Twenty steps of twelve rows each; balance losses are in the losses, and routing is off its noise."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="an extra of its own: pip install camex_ft[deepspeed]")
    folder = spawn(count, engine, *PROTOCOLS)
    for protocol in PROTOCOLS:
        one, several = read(alone / f"{protocol}.pt"), read(folder / f"{protocol}.pt")
        assert len(json.loads(one["lines"])) == 20
        assert_same(several, one, CLOSE)
        start = make(folder / "start", protocol).model.state_dict()
        assert distance(one["weights"], {n: start[n] for n in one["weights"]}) > 1e-2  # they did train


@pytest.mark.slow
def test_what_two_sharding_processes_saved_any_number_goes_on_from(alone: Path, spawn: Spawn) -> None:
    folder = spawn(2, "fsdp", "save")
    whole = read(folder / "save.pt")
    assert_same(whole, read(alone / "save.pt"), 1e-7)  # eight steps of AdamW in float64
    made = make(folder / "resumed", "ties-ca", double=True, max_steps=8)
    made.train(resume_from_checkpoint=str(folder / "saved" / "checkpoint-4"))
    keep(made, folder / "one.pt")
    assert_same(read(folder / "one.pt"), whole, EXACT)
    for count, engine in ((3, "fsdp"), (2, "ddp")):
        assert_same(read(spawn(count, engine, "resume", folder=folder) / "resume.pt"), whole, EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed_goes_on_from_its_own_checkpoints(engine: str, alone: Path, spawn: Spawn) -> None:
    pytest.importorskip("deepspeed", reason="an extra of its own: pip install camex_ft[deepspeed]")
    folder = spawn(2, engine, "save")
    whole = read(folder / "save.pt")
    assert_same(whole, read(alone / "save.pt"), CLOSE)  # it trains in float32 whatever the model has
    assert_same(read(spawn(2, engine, "resume", folder=folder) / "resume.pt"), whole, 0)
