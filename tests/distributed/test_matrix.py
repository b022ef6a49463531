"""Two processes are one, for every family, head, protocol and tuning mode, and with what saves memory: one launch each.

Rows are of several lengths, and evaluation's last batch is filled up: two processes take 10 rows in batches of 4.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed_matrix import CASES, model, outcome
from tests.helpers.distributed_training import ENGINES, distance

WORKER = Path(__file__).with_name("worker.py")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def two(folder: Path) -> Callable[[str], Path]:
    """Where the outcomes of two processes of an engine are."""

    @cache
    def launch(engine: str) -> Path:
        (there := folder / engine).mkdir()
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER), str(there)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **ENGINES[engine]}
        command = [sys.executable, *start, *(f"case:{name}" for name in CASES)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=800, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        return there

    return launch


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[str], dict[str, Any]]:
    return cache(lambda name: outcome(CASES[name], folder / "alone"))


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference.

    Of Nash weights, which go with 1 / |tau|, a twentieth of the relative one: after three steps |tau| is about 1e-3,
    which float32, beside weights of about 1, knows to 1e-4 of its size. Measured: 2e-5, so 1e-6 here.
    """
    scale = {
        n: 20 * float(tensor.abs().max()) if n.endswith("bargain") else 1.0 for n, tensor in other.items()
    }
    return distance(
        {n: tensor / scale[n] for n, tensor in one.items()},
        {n: tensor / scale[n] for n, tensor in other.items()},
    )


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(name: str, engine: str, two: Any, alone: Any) -> None:
    case, one = CASES[name], alone(name)
    several = torch.load(two(engine) / f"{name}.pt", weights_only=True)
    near = case.tolerance
    assert len(one["losses"]) == 3
    for key in ("losses", "loss"):
        assert several[key] == pytest.approx(one[key], abs=near)
    assert several["norms"] == pytest.approx(
        one["norms"], abs=20 * near
    )  # gradients, not the tenth that is a step
    assert apart(several["weights"], one["weights"]) <= near
    assert several["outputs"].shape == one["outputs"].shape
    assert several["outputs"].float() == pytest.approx(one["outputs"].float(), abs=20 * near)
    assert (
        distance({"": torch.zeros(1), **several["routing"]}, {"": torch.zeros(1), **one["routing"]}) <= near
    )
    assert several["loads"].keys() == one["loads"].keys()
    for layer, shares in several["loads"].items():
        assert shares == pytest.approx(one["loads"][layer], abs=1e-6)
    assert several["trained"] == one["trained"]


@pytest.mark.parametrize("name", CASES)
def test_what_is_trained_moves_and_nothing_else(name: str, two: Any) -> None:
    """Every parameter is sharded, frozen ones too."""
    found = torch.load(two("fsdp") / f"{name}.pt", weights_only=True)
    start = model(CASES[name])
    frozen = {n for n, p in start.named_parameters() if not p.requires_grad}
    assert set(found["sharded"]) == {n for n, _ in start.named_parameters()}
    assert set(found["trained"]) == set(found["sharded"]) - frozen
    before = start.state_dict()
    moved = {n for n, tensor in found["weights"].items() if not torch.equal(tensor, before[n])}
    assert moved & set(found["trained"]) and not moved & frozen
