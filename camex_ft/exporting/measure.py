"""Measurements of an export beside the run's model: mean routing, logits, and the time of a forward pass.

    s_bar = mean over groups g of s_g                              [N]
    H     = mean over groups of -sum_i s_gi log s_gi               nats, from 0 to log N
    I     = H(s_bar) - H                                           nats, lost if s_bar serves every group

A group is a sequence, a segment or a token: all that shares routing weights. I is the Jensen-Shannon divergence of the
groups' routing weights, the information that they have about the group: 0 if all are routed alike.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from camex_ft.moe.context import LayerRouting
from camex_ft.results.record import Record
from camex_ft.training.callbacks.monitoring import scaled_to_one
from camex_ft.training.trainer import CamexTrainer
from camex_ft.upcycling import cached
from camex_ft.utils.errors import UserError

# -- mean routing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MeanRouting:
    """Mean routing of some rows, by layer: s_bar [N] in float64, H and I in nats."""

    weights: Mapping[str, Tensor]
    entropy: Mapping[str, float]
    lost: Mapping[str, float]


def _sums(routing: LayerRouting) -> Tensor:
    """Return the sums over the groups of one layer: of the weights, of their entropies, of 1; [N + 2]."""
    s = routing.weights.detach().double().flatten(0, -2).cpu()  # [groups, N]
    mask = s.new_ones(len(s)) if routing.mask is None else routing.mask.flatten().to(s)
    return mask @ torch.cat([s, entropy(s).unsqueeze(-1), s.new_ones(len(s), 1)], dim=-1)


def entropy(s: Tensor) -> Tensor:
    """Return the entropy in nats of routing weights [..., N], scaled to a sum of 1; [...]."""
    p = scaled_to_one(s)
    return -torch.xlogy(p, p).sum(-1)


@torch.no_grad()
def mean_routing(trainer: CamexTrainer, rows: Dataset) -> MeanRouting:
    """Return the mean routing of a trainer's model over encoded rows, one forward pass each, in evaluation mode.

    Raises:
        UserError: rows for an encoder-decoder have no labels, and its decoder needs them.
    """
    sums: dict[str, Tensor] = {}
    model = cast(PreTrainedModel, trainer.model).eval()
    assert trainer.context is not None, "a model without experts has no routing"
    with trainer.context.cached():
        for inputs in batches(trainer, model, rows):
            with trainer.compute_loss_context_manager():
                model(**inputs)
            assert trainer.context.last is not None
            for name, routing in trainer.context.last.layers.items():
                sums[name] = sums.get(name, 0.0) + _sums(routing)
    weights = {name: layer[:-2] / layer[-1] for name, layer in sums.items()}
    inner = {name: float(layer[-2] / layer[-1]) for name, layer in sums.items()}
    # rounding alone makes the loss negative: entropy is concave
    lost = {name: max(float(entropy(w)) - inner[name], 0.0) for name, w in weights.items()}
    return MeanRouting(weights=weights, entropy=inner, lost=lost)


def batches(trainer: CamexTrainer, model: PreTrainedModel, rows: Dataset) -> Iterator[dict[str, Any]]:
    """Yield the arguments of a model's forward pass for every batch of encoded rows, on its device.

    Raises:
        UserError: rows for an encoder-decoder have no labels, and its decoder needs them.
    """
    known = inspect.signature(model.forward).parameters
    for batch in trainer.get_eval_dataloader(rows):
        moved = {
            k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items() if k in known
        }
        if model.config.is_encoder_decoder and "labels" not in moved and model.can_generate():
            raise UserError(
                "the rows of this split have no answers, and the decoder needs them. Use --split train"
            )
        yield {**moved, **trainer.without_cache}


# -- logits and time --------------------------------------------------------------------------------------------------


Form = Literal["dense", "folded", "experts"]
ROUNDS = 9  # forward passes of each model; the median of so many is steady on a busy machine
FEW = 64  # rows: enough for rounding to show, few enough not to take a second evaluation


class Difference(NamedTuple):
    """Largest |y' - y| of the logits over some rows, and the largest |y| to compare it with."""

    largest: float
    scale: float


class Seconds(NamedTuple):
    """Seconds of a forward pass of one batch, before and after: medians of alternating passes."""

    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An export and its measurements, before (of the run's model) and after."""

    folder: Path
    form: Form
    record: Record  # of the run
    split: str  # calibration rows of the mean routing weights; "" and 0 for a model without experts
    rows: int
    before: dict[str, float]  # metrics on the validation splits
    after: dict[str, float]
    parameters: tuple[int, int]
    routing: MeanRouting | None  # over the calibration rows
    difference: Difference
    seconds: Seconds
    note: str = ""  # a remark if the data changed since the run


@torch.no_grad()
def difference(
    trainer: CamexTrainer, one: PreTrainedModel, other: PreTrainedModel, rows: Dataset
) -> Difference:
    """Return the difference of two models' logits on the first rows of a data set."""
    largest = scale = 0.0
    with cached(one), cached(other):
        for inputs in batches(trainer, one, _first(rows, FEW)):
            first, second = (_logits(model, inputs) for model in (one, other))
            largest = max(largest, float((second - first).abs().max()))
            scale = max(scale, float(first.abs().max()))
    return Difference(largest, scale)


@torch.no_grad()
def seconds(trainer: CamexTrainer, one: PreTrainedModel, other: PreTrainedModel, rows: Dataset) -> Seconds:
    """Return the times of a forward pass of the first batch, after a warm-up."""
    size = trainer.args.eval_batch_size
    inputs = next(iter(batches(trainer, one, _first(rows, size))))
    with cached(one), cached(other):
        return Seconds(*in_turns([partial(_logits, model, inputs) for model in (one, other)]))


def in_turns(calls: list[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """Return the median seconds of each call; the calls alternate, and the first round does not count."""
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


def _first(rows: Dataset, count: int) -> Dataset:
    return rows.select(range(min(count, len(rows))))


def _logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    logits: Tensor = model(**inputs).logits
    return logits.float()
