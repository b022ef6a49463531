"""Seconds of a training step, predicted from multiply-adds at a rate, and what processes send at a bandwidth.

    seconds = 2 * multiply-adds * micro-batches / rate  +  bytes sent / bandwidth

A matrix costs its multiply-adds once forward, once for the gradient of its input, once for its own where it is trained,
and once more under gradient checkpointing. Merged maps and curvature cost what `moe.merging.cost_model` says, in units
of its rate for products with tokens: those ratios were measured on a CPU. What is sent is not overlapped with the rest.
Norms, activations, softmax, the optimizer and reading data are left out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from camex_ft.estimate.engines import Engine, Stored
from camex_ft.estimate.flow import Flow
from camex_ft.estimate.operations import groups_of, linears_of, rank_of, shape_of
from camex_ft.estimate.precision import Precision
from camex_ft.estimate.survey import Survey
from camex_ft.moe.layers.ffn import ExpertFFN, MixtureFFN
from camex_ft.moe.layers.low_rank_expert_linear import LowRankLinear
from camex_ft.moe.merging.cost_model import RATES, cheaper, predict

TFLOPS = 10.0  # what a GPU is taken to sustain, in 10^12 operations a second
BANDWIDTH = 10e9  # what a process is taken to send and receive, in bytes a second
PROBE, REPEATS = 1024, 5
THRICE = 3.0  # forward, and two gradients


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Seconds of an optimizer step.

    Attributes:
        computing: products of matrices.
        sending: gradients and weights between processes.
    """

    computing: float
    sending: float

    @property
    def total(self) -> float:
        """Both, one after the other."""
        return self.computing + self.sending


def duration(
    model: nn.Module,
    found: Survey,
    layers: Mapping[str, ExpertFFN],
    precision: Precision,
    *,
    tflops: float,
    engine: Engine,
    bandwidth: float = BANDWIDTH,
) -> Duration:
    """Return how long an optimizer step takes on each process.

    Args:
        model: with experts or dense, on any device.
        found: the dense backbone.
        layers: those of its feed-forward layers that have experts, by path.
        precision: how the step is run.
        tflops: 10^12 operations a second that a device sustains.
        engine: of the processes.
        bandwidth: bytes a second that a process sends.
    """
    work = _outside(model, found, layers, precision) + sum(
        _layer(layers[ffn.path], found, found.tokens(ffn.path), precision)
        for ffn in found.ffns
        if ffn.path in layers
    )
    stored = Stored.of(model)
    weights, gradients = sum(stored.weights.values()), sum(stored.gradients.values())
    sent = 2 * weights + gradients if engine.shares_weights else 2 * gradients
    share = (engine.processes - 1) / engine.processes
    return Duration(
        computing=2 * work * found.batch.steps / (tflops * 1e12), sending=sent * share / bandwidth
    )


def _outside(model: nn.Module, found: Survey, layers: Mapping[str, ExpertFFN], precision: Precision) -> float:
    """Return the multiply-adds of a micro-batch outside of layers with experts, forward and backward."""
    flow, rows = Flow(model), found.batch.rows

    again = int(precision.checkpointing)

    def passes(path: str) -> int:
        return 1 + again + int(flow.passes(path)) + int(flow.learns(path))

    total = sum(p.tokens * p.out * p.width * passes(p.path) for p in found.products)
    for each in found.attentions:  # both factors of its products have a gradient, where there is one
        times = 1 + again + 2 * flow.passes(each.path)
        total += 2 * each.queries * each.keys * each.width * times
    for ffn in found.ffns:
        if ffn.path not in layers:
            total += (
                found.tokens(ffn.path)
                * passes(ffn.path)
                * sum(weight.numel() for weight, _ in ffn.weights.values())
            )
    return float(rows * total)


def _layer(layer: ExpertFFN, found: Survey, tokens: int, precision: Precision) -> float:
    """Return the multiply-adds of a layer with experts, or what takes as long as so many."""
    rows, total = found.batch.rows, 0.0
    groups, length = groups_of(layer, tokens, rows)
    passes = THRICE + precision.checkpointing
    for linear in layer.linears.values():
        area = linear.in_features * linear.out_features
        if isinstance(linear, LowRankLinear):
            thin = rank_of(linear) * (linear.in_features + linear.out_features)
            many = layer.settings.top_k if isinstance(layer, MixtureFFN) else layer.settings.experts
            base = layer.settings.top_k if isinstance(layer, MixtureFFN) else 1
            total += rows * tokens * ((passes - 1) * base * area + passes * many * thin)
        elif isinstance(layer, MixtureFFN):
            total += passes * layer.settings.top_k * rows * tokens * area
    if not isinstance(layer, MixtureFFN):
        for whole in linears_of(layer):
            shape = shape_of(whole, layer, groups, length)
            total += passes * predict(cheaper(shape), shape) / (RATES["merge"]["token"] * 1e-9)
    return total


@lru_cache
def measured_tflops(*, half: bool = False) -> float:
    """Return what this machine's CPU sustains in a product of two matrices, in 10^12 operations a second."""
    dtype = torch.bfloat16 if half else torch.float32
    left = torch.ones(PROBE, PROBE, dtype=dtype)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        left @ left
        times.append(time.perf_counter() - started)
    return 2 * PROBE**3 / min(times) / 1e12
