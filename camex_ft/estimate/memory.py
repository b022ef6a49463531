"""Peak memory of one training step on one device, in bytes.

    peak     = framework + greatest over the step of what is live + holes
    live     = weights + optimizer + vectors + working + activations not freed yet + gradients made so far

The step is followed block by block: forward, where activations grow; backward from the last block to the first, where
they are freed and gradients take their place; and the optimizer, with all gradients and no activations. Gradients of
the step before are gone by then, unless micro-batches add to them. Weights, gradients and the optimizer's state are
counted, not estimated: parameters are float32, also under bf16 and fp16, which are autocast; AdamW holds two moments
and a step count of each trained parameter. Statistics that protocols keep in buffers count as weights. Activations and
working memory are estimates (`activations`, `working`), shares of several processes are in `engines`.

On a CPU the process holds more than is live: memory that was freed is left in holes, which what comes next often does
not fit. With activations A, gradients G and the optimizer's state O, all of tensors up to 32 MiB, what is lost is about

    holes = max(G + 0.4 A, 0.4 A', 1.1 A - 3 O)        A': A without gradient checkpointing

a description of what was measured (docs/plan.md), not a law: all that comes and goes leaves holes, and where little is
trained the activations of a step need about as much room again beside what those of the step before left, since no
moments took it. Nothing is lost where MALLOC_MMAP_THRESHOLD_ is set, so that every large tensor has a mapping of its
own, or on a GPU, whose allocator is another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from camex_ft.estimate import working
from camex_ft.estimate.activations import LARGE, Saved, saved
from camex_ft.estimate.engines import Engine, Stored
from camex_ft.estimate.operations import linears_of, shares_vectors
from camex_ft.estimate.precision import FLOAT, Precision
from camex_ft.estimate.survey import Survey
from camex_ft.moe.layers.ffn import ExpertFFN

MOMENTS = {"sgd": 0, "adagrad": 1, "rmsprop": 1}  # optimizers of the Trainer that hold fewer than AdamW
BESIDE, AGAIN, TAKEN = 0.4, 1.1, 3  # of holes: by activations, where little is trained, less by moments
MAPPED, MOST_MAPPED = "MALLOC_MMAP_THRESHOLD_", 1 << 20


@dataclass(frozen=True, kw_only=True)
class Where:
    """Device and processes of a step, beside its precision.

    Attributes:
        engine: of the processes.
        framework: bytes that are held before there is a model: by the process on a CPU, on the device of a GPU.
        mapped: large tensors have mappings of their own, which are given back when they are freed.
    """

    engine: Engine = field(default_factory=Engine)
    framework: int = 0
    mapped: bool = False

    @staticmethod
    def maps(environment: Mapping[str, str] = os.environ) -> bool:
        """Return whether the environment asks glibc for such mappings."""
        given = environment.get(MAPPED, "")
        return given.isdigit() and int(given) <= MOST_MAPPED


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one training step on one device, each part at its most.

    Attributes:
        weights: with buffers.
        gradients: of all that is trained.
        optimizer: its state.
        vectors: domain vectors that are kept from micro-batch to micro-batch.
        activations: saved by the forward pass; estimated, as are those that follow.
        working: of kernels, the backward pass, and what an engine gathers or sends.
        holes: what the heap loses between tensors.
        framework: what is held before there is a model.
        total: the peak, less than the sum of the parts, which are not all there at once.
        moment: when it is: "forward", "backward" or "optimizer".
    """

    weights: int
    gradients: int
    optimizer: int
    vectors: int
    activations: int
    working: int = 0
    holes: int = 0
    framework: int = 0
    total: int = 0
    moment: str = "backward"

    @property
    def apart(self) -> int:
        """Memory of the parts that is not in use at the peak, below 0."""
        parts = self.weights + self.gradients + self.optimizer + self.vectors + self.activations
        return self.total - parts - self.working - self.holes - self.framework


def memory(
    model: nn.Module,
    found: Survey,
    layers: Mapping[str, ExpertFFN],
    precision: Precision,
    where: Where | None = None,
) -> Memory:
    """Return what one training step of a model holds on one device.

    Args:
        model: with experts or dense, on any device.
        found: the dense backbone.
        layers: those of its feed-forward layers that have experts, by path.
        precision: how the step is run.
        where: on what; None: one process, without its framework.
    """
    where = where or Where()
    trained = [p for p in model.parameters() if p.requires_grad]
    stored = Stored.of(model)
    weights, gradients, gathered = stored.per_process(where.engine)
    share = where.engine.processes if where.engine.shares_state else 1
    kept = [m for layer in layers.values() for m in linears_of(layer) if shares_vectors(m, found.batch)]
    # T alone: its gradient becomes that of the experts
    vectors = sum(m.experts.numel() * m.experts.element_size() for m in kept)
    held = saved(found, layers, precision, model)
    buffers = working.scratch(found, layers, precision)
    made = Memory(
        weights=round(weights),
        gradients=round(gradients),
        optimizer=round(optimizer_bytes(trained, precision.optimizer) / share),
        vectors=vectors,
        activations=round(held.checkpointed() if precision.checkpointing else held.total),
    )
    base = made.weights + made.optimizer + made.vectors + buffers + gathered
    moments = {
        "forward": base + _forward(held, precision) + (gradients if found.batch.steps > 1 else 0),
        "backward": base + max(_backward(model, found, layers, precision, held, stored, share)),
        "optimizer": base + gradients + working.stepping(trained, precision.optimizer) / share,
    }
    moment = max(moments, key=lambda name: moments[name])
    live = moments[moment]
    parts = base + made.gradients + made.activations
    holes = 0.0 if precision.gpu or where.mapped else _holes(made, held, trained)
    return replace(
        made,
        working=round(buffers + gathered + max(0.0, live - parts)),
        holes=round(holes),
        framework=where.framework,
        total=round(where.framework + live + holes),
        moment=moment,
    )


def _holes(made: Memory, held: Saved, trained: list[nn.Parameter]) -> float:
    """Return what the heap of a CPU's process loses between tensors."""
    sizes = [p.numel() * p.element_size() for p in trained]
    share = sum(size for size in sizes if size <= LARGE) / max(1, sum(sizes))
    small = 1 - held.large / max(1.0, held.total)
    activations, gradients, optimizer = (
        small * made.activations,
        share * made.gradients,
        share * made.optimizer,
    )
    left = max(gradients + BESIDE * activations, BESIDE * small * held.total)
    return max(left, AGAIN * activations - TAKEN * optimizer)


def _forward(held: Saved, precision: Precision) -> float:
    """Return the activations at the end of the forward pass: the logits are there beside their log-probabilities."""
    kept = held.total - sum(held.blocks.values()) + sum(held.stream.values())
    return (kept if precision.checkpointing else held.total) + held.logits


def _backward(
    model: nn.Module,
    found: Survey,
    layers: Mapping[str, ExpertFFN],
    precision: Precision,
    held: Saved,
    stored: Stored,
    share: int,
) -> Iterator[float]:
    """Yield what of activations, gradients and working memory is live at each block, from the last to the first."""
    again = (
        found.batch.steps > 1
    )  # earlier micro-batches' gradients are there, and new ones are added to them
    largest = max((p.numel() for p in model.parameters() if p.requires_grad), default=0) * FLOAT
    made = sum(stored.gradients.values()) / share + largest if again else 0.0
    gradients = {} if again else stored.gradients
    extra = working.transients(found, layers, precision)
    kept = held.stream if precision.checkpointing else held.blocks
    left = held.fixed + held.outside + sum(kept.values())
    logits = sum(p.out * p.width for p in found.products if p.vocabulary) * FLOAT
    outside = gradients.get("", 0)
    yield left + made + held.logits * 3  # gradients of the logits and of their log-probabilities
    made += min(logits, outside) / share  # the head's come first, an embedding's last
    for block in reversed(list(held.blocks)):
        run = held.blocks[block] if precision.checkpointing else 0.0
        most = left + run + made
        left -= kept.get(block, 0.0)
        made += gradients.get(block, 0) / share
        yield max(most, left + made) + extra.get(block, 0.0)
    yield left + made + max(0.0, outside - logits) / share + working.tied(model)


def optimizer_bytes(trained: list[nn.Parameter], name: str = "adamw_torch_fused") -> int:
    """Return what the optimizer holds of these parameters; those that are not known here count as AdamW."""
    moments = MOMENTS.get(name, 2)
    counts = FLOAT * len(trained) if moments else 0  # of steps
    return sum(moments * p.numel() * p.element_size() for p in trained) + counts


def gpu_here() -> bool:
    """Return whether a step would run on a GPU on this machine."""
    return torch.cuda.is_available()
