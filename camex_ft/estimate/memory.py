"""Peak memory of one training step on one device, in bytes.

    peak     = framework + largest live memory over the step + heap
    live     = weights + optimizer + vectors + working + activations not freed yet + gradients made so far

The step is followed block by block: forward, where activations grow; backward from the last block to the first, where
they are freed and gradients take their place; and the optimizer, with all gradients and no activations. Gradients of
the step before are gone by then, unless micro-batches add to them. Weights, gradients and the optimizer's state are
counted, not estimated: parameters are float32, also under bf16 and fp16, which are autocast; AdamW holds two moments
and a step count of each trained parameter. Statistics that protocols store in buffers count as weights. Activations
and working memory are estimates (`activations`). On a CPU the C library does not give back all that was freed: about
half as much as gradients and activations take, and nearly all activations where little is trained.

Several processes share a model by the engine that trains it:

    ddp      everything on each, and gradients once more in the buckets that are sent
    zero2    weights whole, gradients and optimizer shared out; the gradients of a block before they are
    fsdp     all three shared out; weights outside of blocks gathered throughout, two blocks in turn, and the
    zero3    gradients of a block before they are shared out

A second block is gathered while the one before it is at work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import nn

from camex_ft.backbones.base import block_of
from camex_ft.estimate.activations import Saved, backward_bytes, saved, workspace_bytes
from camex_ft.estimate.operations import linears_of, shares_vectors
from camex_ft.estimate.survey import FLOAT, Precision, Survey
from camex_ft.moe.layers.ffn import ExpertFFN
from camex_ft.utils.errors import UserError, nearest

Name = Literal["ddp", "fsdp", "zero2", "zero3"]
NAMES: tuple[Name, ...] = get_args(Name)
GATHERED = 2  # blocks at a time
MOMENTS = {"sgd": 0, "adagrad": 1, "rmsprop": 1}  # optimizers of the Trainer that hold fewer than AdamW


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Engine that trains a model in several processes, one a device."""

    name: str = "ddp"
    processes: int = 1

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UserError(
                f"--engine: unknown engine '{self.name}'.{nearest(self.name, NAMES)} Known: {', '.join(NAMES)}"
            )
        if self.processes < 1:
            raise UserError(f"--gpus: expected at least 1, got {self.processes}")

    @property
    def shares_weights(self) -> bool:
        """Return whether a process stores only its share of the weights."""
        return self.processes > 1 and self.name in ("fsdp", "zero3")

    @property
    def shares_state(self) -> bool:
        """Return whether a process stores only its share of gradients and optimizer state."""
        return self.processes > 1 and self.name != "ddp"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Bytes of weights and gradients by block, "" outside of all blocks, each tensor once; bytes of buffers."""

    weights: Mapping[str, int]
    gradients: Mapping[str, int]
    buffers: int

    @classmethod
    def of(cls, model: nn.Module) -> Stored:
        """Return the bytes that a model on any device stores."""
        weights: dict[str, int] = defaultdict(int)
        gradients: dict[str, int] = defaultdict(int)
        for name, parameter in model.named_parameters():
            size = parameter.numel() * parameter.element_size()
            weights[block_of(name)] += size
            gradients[block_of(name)] += size if parameter.requires_grad else 0
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        return cls(weights=weights, gradients=gradients, buffers=buffers)

    def per_process(self, engine: Engine) -> tuple[float, float, float]:
        """Return bytes of weights and of gradients that one process stores, and bytes that it gathers or sends."""
        n = engine.processes
        weights, gradients = sum(self.weights.values()), sum(self.gradients.values())
        if n == 1:
            return weights + self.buffers, gradients, 0.0
        if not engine.shares_state:
            return weights + self.buffers, gradients, gradients
        largest = {
            name: max((size for block, size in sizes.items() if block), default=0)
            for name, sizes in (("weights", self.weights), ("gradients", self.gradients))
        }
        whole = largest["gradients"] + self.gradients.get("", 0)
        if not engine.shares_weights:
            return weights + self.buffers, gradients / n, whole
        gathered = GATHERED * largest["weights"] + self.weights.get("", 0)
        return weights / n + self.buffers, gradients / n, gathered + whole


@dataclass(frozen=True, kw_only=True)
class Where:
    """Engine of a step's processes, and bytes that each holds, or its GPU, before there is a model."""

    engine: Engine = field(default_factory=Engine)
    framework: int = 0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one training step on one device, each part at its largest.

    Attributes:
        weights: with buffers.
        gradients: of all that is trained.
        optimizer: its state.
        vectors: transformed domain vectors cached from micro-batch to micro-batch.
        activations: saved by the forward pass; estimated, as are those that follow.
        working: of kernels, the backward pass, and the gathering or sending of an engine.
        heap: freed memory that the C library of a CPU's process does not give back.
        framework: held before there is a model.
        total: the peak, less than the sum of the parts, which are not all there at once.
        moment: of the peak: "forward", "backward" or "optimizer".
    """

    weights: int
    gradients: int
    optimizer: int
    vectors: int
    activations: int
    working: int = 0
    heap: int = 0
    framework: int = 0
    total: int = 0
    moment: str = "backward"

    @property
    def apart(self) -> int:
        """Memory of the parts that is not in use at the peak, below 0."""
        parts = self.weights + self.gradients + self.optimizer + self.vectors + self.activations
        return self.total - parts - self.working - self.heap - self.framework


def memory(
    model: nn.Module,
    dense: Survey,
    layers: Mapping[str, ExpertFFN],
    precision: Precision,
    where: Where | None = None,
) -> Memory:
    """Return the memory of one training step of a model on one device.

    Args:
        model: with experts or dense, on any device.
        dense: the dense backbone.
        layers: those of its feed-forward layers that have experts, by path.
        precision: of the step.
        where: its processes; None: one process, without its framework.
    """
    where = where or Where()
    trained = [p for p in model.parameters() if p.requires_grad]
    stored = Stored.of(model)
    weights, gradients, gathered = stored.per_process(where.engine)
    share = where.engine.processes if where.engine.shares_state else 1
    cached = [m for layer in layers.values() for m in linears_of(layer) if shares_vectors(m, dense.batch)]
    activations = saved(dense, layers, precision, model)
    buffers = workspace_bytes(dense, layers, precision)
    parts = Memory(
        weights=round(weights),
        gradients=round(gradients),
        optimizer=round(optimizer_bytes(trained, precision.optimizer) / share),
        # T alone: its gradient becomes that of the experts
        vectors=sum(m.experts.numel() * m.experts.element_size() for m in cached),
        activations=round(activations.checkpointed() if precision.checkpointing else activations.total),
    )
    base = parts.weights + parts.optimizer + parts.vectors + buffers + gathered
    left = activations.until_backward(checkpointing=precision.checkpointing)
    if dense.batch.steps > 1:  # gradients of earlier micro-batches are there, and new ones are added to them
        largest = max((p.numel() for p in trained), default=0) * FLOAT
        before, present, new = gradients, sum(stored.gradients.values()) / share + largest, dict[str, float]()
    else:
        before, present, new = 0.0, 0.0, {block: size / share for block, size in stored.gradients.items()}
    head = FLOAT * sum(p.out * p.width for p in dense.products if p.vocabulary) / share
    backward = _backward(
        activations,
        backward_bytes(dense, layers, precision),
        left,
        present,
        new,
        head,
        checkpointing=precision.checkpointing,
    )
    moments = {
        "forward": base + before + left + 2 * activations.logits,
        "backward": base + max(backward),
        "optimizer": base + gradients,
    }
    moment = max(moments, key=lambda name: moments[name])
    live = moments[moment]
    heap = 0.0
    if not precision.gpu:  # as measured (docs/plan.md); moments take the place of freed activations
        heap = max((parts.gradients + parts.activations) / 2, parts.activations - parts.optimizer)
    return replace(
        parts,
        working=round(buffers + gathered + max(0.0, live - base - parts.gradients - parts.activations)),
        heap=round(heap),
        framework=where.framework,
        total=round(where.framework + live + heap),
        moment=moment,
    )


def _backward(
    activations: Saved,
    needed: Mapping[str, float],
    left: float,
    present: float,
    new: Mapping[str, float],
    head: float,
    *,
    checkpointing: bool,
) -> Iterator[float]:
    """Yield live activations, gradients and working memory at each block, from the last to the first.

    Args:
        activations: saved by the forward pass.
        needed: working memory of each block.
        left: activations that are not freed yet.
        present: gradients of earlier micro-batches.
        new: gradients of each block that the pass adds to them.
        head: gradient of a language model's head.
        checkpointing: blocks are run again.
    """
    outside = new.get("", 0.0)
    yield left + present + activations.logits * 3  # gradients of the logits and of their log-probabilities
    present += min(head, outside)  # the head's come first, an embedding's last
    for block, size in reversed(list(activations.blocks.items())):
        held = activations.stream.get(block, 0.0) if checkpointing else size
        most = left + present + (size if checkpointing else 0.0)  # its pass is run again
        left -= held
        present += new.get(block, 0.0)
        yield max(most, left + present) + needed.get(block, 0.0)
    yield left + present + max(0.0, outside - head)


def optimizer_bytes(trained: list[nn.Parameter], name: str = "adamw_torch_fused") -> int:
    """Return the bytes of the optimizer's state; an optimizer that is not known here counts as AdamW."""
    moments = MOMENTS.get(name, 2)
    counts = FLOAT * len(trained) if moments else 0  # of steps
    return sum(moments * p.numel() * p.element_size() for p in trained) + counts


def gpu_here() -> bool:
    """Return whether a step would run on a GPU on this machine."""
    return torch.cuda.is_available()
