"""Measure an export beside the run's model: logits, and the time of a forward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from camex_ft.exporting.routing import MeanRouting, batches
from camex_ft.results.record import Record
from camex_ft.training.trainer import CamexTrainer
from camex_ft.upcycling import cached

Form = Literal["dense", "folded"]
ROUNDS = 9  # forward passes of each model; the median of so many is steady on a busy machine
FEW = 64  # rows: enough for rounding to show, few enough not to take a second evaluation


class Difference(NamedTuple):
    """Largest |y' - y| of the logits over some rows, and the largest |y|, which it is to be compared with."""

    largest: float
    scale: float

    @property
    def relative(self) -> float:
        """Largest |y' - y| / largest |y|."""
        return self.largest / self.scale if self.scale else self.largest


class Seconds(NamedTuple):
    """Of a forward pass of one batch, within an evaluation: before and after; medians of passes in turns."""

    before: float
    after: float

    @property
    def ratio(self) -> float:
        """after / before."""
        return self.after / self.before


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An export, and what it was measured to be.

    Attributes:
        folder: where it is.
        form: "dense" or "folded".
        record: of the run.
        split, rows: that routing weights were averaged over; of a model without experts "" and 0.
        before, after: metrics on the validation splits, of the run's model and of the export.
        parameters: numbers of parameters, before and after.
        routing: over the calibration rows; None without experts.
        difference: of the logits.
        seconds: of a forward pass.
        note: says that the data are not those of the run; else "".
    """

    folder: Path
    form: Form
    record: Record
    split: str
    rows: int
    before: dict[str, float]
    after: dict[str, float]
    parameters: tuple[int, int]
    routing: MeanRouting | None
    difference: Difference
    seconds: Seconds
    note: str = ""


@torch.no_grad()
def difference(
    trainer: CamexTrainer, one: PreTrainedModel, other: PreTrainedModel, rows: Dataset
) -> Difference:
    """Return how far the logits of `other` are from those of `one`, on the first rows of a data set."""
    largest = scale = 0.0
    with cached(one), cached(other):
        for inputs in batches(trainer, one, _some(rows, FEW)):
            first, second = (_logits(model, inputs) for model in (one, other))
            largest = max(largest, float((second - first).abs().max()))
            scale = max(scale, float(first.abs().max()))
    return Difference(largest, scale)


@torch.no_grad()
def seconds(trainer: CamexTrainer, one: PreTrainedModel, other: PreTrainedModel, rows: Dataset) -> Seconds:
    """Return the times of a forward pass of the first batch; both models have had one before."""
    size = trainer.args.eval_batch_size
    inputs = next(iter(batches(trainer, one, _some(rows, size))))
    with cached(one), cached(other):
        return Seconds(*in_turns([partial(_logits, model, inputs) for model in (one, other)]))


def in_turns(calls: list[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """Return the median seconds of each call, made in turns after one that does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for round in range(rounds + 1):
        for call, spent in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round:
                spent.append(time.perf_counter() - started)
    return [statistics.median(spent) for spent in times]


def _some(rows: Dataset, count: int) -> Dataset:
    return rows.select(range(min(count, len(rows))))


def _logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    made: Tensor = model(**inputs).logits
    return made.float()
