"""``camex-ft bench step``: a training step of a whole backbone, dense and with experts in every layer.

A step is what the Trainer does with one batch: forward pass, the model's loss and the balance losses, backward pass,
SGD, and gradients freed.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from transformers import PreTrainedModel

from camex_ft.bench import memory
from camex_ft.bench.backbones import build, inputs
from camex_ft.bench.child import in_child
from camex_ft.bench.settings import StepBench
from camex_ft.bench.timing import Side, alternate, medians
from camex_ft.upcycling import routing_context, upcycle

RATE = 1e-3
APART = 0.1  # how far experts are from the base, relative to the weights' standard deviation
STEPS = 2  # of which memory is measured: the second finds what the first has left


def dense_model(settings: StepBench) -> PreTrainedModel:
    """Return the dense backbone in the number format and on the device that are asked for."""
    model = build(settings.backbone)
    model.to(device=settings.device, dtype=getattr(torch, settings.dtype))  # type: ignore[call-arg]
    return model


def upcycled(dense: PreTrainedModel, settings: StepBench) -> PreTrainedModel:
    """Return a copy of `dense` with experts in every layer, which differ from the base."""
    merging = {
        "protocol": settings.protocol,
        "experts": settings.experts,
        "top_k": settings.top_k,
        "curvature": {"kind": settings.curvature, "rank": settings.rank},
    }
    return upcycle(dense, merging=merging, upcycle={"layers": "all", "init": "noise", "noise": APART})


class Step:
    """A training step of one model, on the same batch at every call."""

    def __init__(self, model: PreTrainedModel, settings: StepBench) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        self.batch = inputs(model, batch=settings.batch, length=settings.length)

    def __call__(self) -> None:
        """Take the step."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self) -> torch.Tensor:
        """Return the training loss, as `CamexTrainer.compute_loss` has it."""
        loss: torch.Tensor = self.model(**self.batch).loss
        context = routing_context(self.model)
        balance = context.last.balance_loss() if context is not None and context.last is not None else None
        return loss if balance is None else loss + balance.to(loss.device)


def peaks(settings: StepBench) -> dict[str, float | None]:
    """Return the peak memory of a process that makes the upcycled model and takes two steps; GiB.

    ``peak_rss_gb`` is that of the steps, ``building_peak_rss_gb`` that of everything before, None where the system
    cannot tell them apart; on a GPU ``peak_gpu_gb`` is what torch allocated there in the steps.
    """
    dense = dense_model(settings)
    model = upcycled(dense, settings)
    del dense
    step = Step(model, settings)
    building = memory.peak_resident()
    apart = memory.reset_peak()
    on_gpu = settings.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        step()
    found: dict[str, float | None] = {
        "peak_rss_gb": memory.peak_resident() / memory.GIB,
        "building_peak_rss_gb": building / memory.GIB if apart else None,
    }
    return {**found, "peak_gpu_gb": torch.cuda.max_memory_allocated() / memory.GIB} if on_gpu else found


def bench_step(settings: StepBench) -> dict[str, Any]:
    """Return the figures: median seconds a step, dense and upcycled, their ratio, peak memory in GiB, parameters."""
    peak = in_child(peaks, settings)
    dense = dense_model(settings)
    model = upcycled(dense, settings)
    gc.collect()
    sides = {"dense": Side(Step(dense, settings)), "upcycled": Side(Step(model, settings))}
    times = alternate(sides, repeats=settings.repeats, device=settings.device)
    median = medians(times)
    return {
        "dense_step_s": median["dense"],
        "step_s": median["upcycled"],
        "ratio_dense": median["upcycled"] / median["dense"],
        **peak,
        "parameters": {"dense": dense.num_parameters(), "upcycled": model.num_parameters()},
        "times": times,
    }
