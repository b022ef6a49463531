"""Times of several sides in one run: a call of each to warm up, then in turns, so that all are disturbed alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


def nothing() -> None:
    """Prepare nothing."""


class Side(NamedTuple):
    """One of the things that are compared: `run` is timed, `prepare` comes before every `run` and is not."""

    run: Callable[[], object]
    prepare: Callable[[], object] = nothing


def alternate(sides: Mapping[str, Side], *, repeats: int, device: str) -> dict[str, list[float]]:
    """Return the times of each side in seconds, `repeats` of them: a, b, c, a, b, c, ..., after one call of each."""
    for side in sides.values():
        timed(side, device)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            times[name].append(timed(side, device))
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Return each side's median time, in seconds."""
    return {name: statistics.median(each) for name, each in times.items()}


def timed(side: Side, device: str) -> float:
    """Return the seconds that one run of a side takes."""
    side.prepare()
    _wait(device)
    start = time.perf_counter()
    side.run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
