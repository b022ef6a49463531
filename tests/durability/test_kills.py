"""Killed at random moments and started again until it is done, a run ends as one that nobody killed, to the bit."""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.killed_runs import PHASES, Runs, differences, folder_of, moment, outcome, write

KILLS = 10  # of each protocol


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    made = Runs()
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("protocol", "seed", "number"),
    [
        ("ties-ca", 1, signal.SIGKILL),
        ("ep-camex", 2, signal.SIGKILL),
        ("fisher", 3, signal.SIGKILL),
        ("smoe", 4, signal.SIGTERM),
    ],
)
def test_runs_that_were_killed_end_as_their_twin(
    protocol: str, seed: int, number: int, runs: Runs, tmp_path: Path
) -> None:
    """SIGTERM is served: in training that saves the step."""
    log = tmp_path / "log"
    assert runs.whole(write(tmp_path / "whole", protocol, tmp_path / "whole.yaml"), log) == 0, log.read_text()
    whole = outcome(tmp_path / "whole")
    assert whole["left"] == ["config.yaml", "history.jsonl", "model", "predictions", "record.json"]
    output, draw, kills, ends = tmp_path / "killed", random.Random(seed), Counter[str](), 0
    config = write(output, protocol, tmp_path / "killed.yaml")
    while sum(kills.values()) < KILLS or folder_of(output) is not None:
        over = sum(kills.values()) >= KILLS
        phase = "none" if over else PHASES[sum(kills.values()) % len(PHASES)]
        code = (
            runs.whole(config, log)
            if over
            else runs.killed(config, log, *moment(phase, output, draw), number)
        )
        if code in (-number, 128 + number):
            kills[phase] += 1
            continue
        assert code == 0, log.read_text()
        assert list(differences(outcome(output), whole)) == []
        ends += 1
        shutil.rmtree(output)
    print(f"{protocol}: {dict(kills)} {signal.Signals(number).name}, {ends} runs ended as their twin")
    assert ends
