"""A protocol written by somebody else: one file in a folder of their own, and nothing else changes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROTOCOL = '''
"""`loudest`: each entry of the domain vectors is kept for the expert that moved it most."""

from typing import Annotated

from annotated_types import Ge
from torch import Tensor

from camex_ft.protocols import protocol


@protocol("loudest", summary="the largest entry over experts", source="this test")
def loudest(tau: Tensor, *, rest: Annotated[float, Ge(0)] = 0.0) -> Tensor:
    """keep_i = 1 where |tau_i| is the largest over experts, else `rest`."""
    largest = tau.abs() >= tau.abs().amax(0)
    return largest.to(tau.dtype) + (~largest).to(tau.dtype) * rest
'''
COMMANDS = [
    ["ls", "protocols"],
    ["validate", "glue", "profile=embedded", "merging.protocol=loudest", "merging.options.rest=0.25"],
    [
        *("run", "glue", "profile=embedded", "merging.protocol=loudest-ca", "data.train_rows=8"),
        *("data.eval_rows=8", "training.max_steps=1", "output.dir=results"),
    ],
    ["validate", "glue", "profile=embedded", "merging.protocol=loudest", "merging.options.rest=-1"],
]
SCRIPT = """
import json, sys
from camex_ft.cli import app
from camex_ft.utils.errors import guard
for command in json.loads(sys.argv[1]):
    print("code", guard(lambda: app(command, standalone_mode=False)), flush=True)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "loudest.py").write_text(PROTOCOL)
    return {**os.environ, "CAMEX_FT_PLUGINS": str(folder), "COLUMNS": "200"}


def test_it_is_listed_validated_and_trained(environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(COMMANDS)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    listed, validated, ran, refused = re.split(r"code \w+\n", done.stdout)[:4]
    assert re.findall(r"code (\w+)", done.stdout) == ["0", "0", "0", "2"], done.stderr
    assert "loudest-ca" in listed
    assert "rest: 0.25" in validated
    assert "loudest-ca, seed 42" in ran
    assert not refused.strip()
    assert "rest" in done.stderr
    (record,) = (tmp_path / "results" / "runs").glob("*/record.json")
    assert json.loads(record.read_text())["protocol"] == "loudest-ca"


@pytest.mark.slow
def test_invariants_cover_it(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/invariants"]
    done = subprocess.run(
        [*command, "-k", "loudest and (bert or not sequence) and not camembert", "--tb=short"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= 20, done.stdout[-500:]
