"""Share of a model that each of several processes holds, by the engine that trains it.

    ddp      everything on each, and gradients once more in the buckets that are sent
    zero2    weights whole, gradients and optimizer shared out; the gradients of a block before they are
    fsdp     all three shared out; what stands outside of blocks gathered throughout, two blocks in turn, and the
    zero3    gradients of a block before they are shared out

A second block is gathered while the one before it is at work. With one process all of them are the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from camex_ft.estimate.survey import block_of
from camex_ft.utils.errors import UserError, nearest

Name = Literal["ddp", "fsdp", "zero2", "zero3"]
NAMES: tuple[Name, ...] = get_args(Name)
GATHERED = 2  # blocks at a time


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
        """Return whether a process stores its share of the weights alone."""
        return self.processes > 1 and self.name in ("fsdp", "zero3")

    @property
    def shares_state(self) -> bool:
        """Return whether a process stores its share of gradients and optimizer's state alone."""
        return self.processes > 1 and self.name != "ddp"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Bytes of weights (with buffers) and gradients by block, "" for what is outside of all; each tensor once."""

    weights: Mapping[str, int]
    gradients: Mapping[str, int]
    buffers: int

    @classmethod
    def of(cls, model: nn.Module) -> Stored:
        """Return what a model on any device stores."""
        weights: dict[str, int] = defaultdict(int)
        gradients: dict[str, int] = defaultdict(int)
        for name, parameter in model.named_parameters():
            size = parameter.numel() * parameter.element_size()
            weights[block_of(name)] += size
            gradients[block_of(name)] += size if parameter.requires_grad else 0
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        return cls(weights=weights, gradients=gradients, buffers=buffers)

    def per_process(self, engine: Engine) -> tuple[float, float, float]:
        """Return bytes of weights and of all gradients that one process stores, and of what it gathers or sends."""
        n = engine.processes
        weights, gradients = sum(self.weights.values()), sum(self.gradients.values())
        if n == 1:
            return weights + self.buffers, gradients, 0.0
        if not engine.shares_state:
            return weights + self.buffers, gradients, gradients
        whole = self._most(self.gradients) + self.gradients.get("", 0)
        if not engine.shares_weights:
            return weights + self.buffers, gradients / n, whole
        gathered = GATHERED * self._most(self.weights) + self.weights.get("", 0)
        return weights / n + self.buffers, gradients / n, gathered + whole

    @staticmethod
    def _most(sizes: Mapping[str, int]) -> int:
        return max((size for block, size in sizes.items() if block), default=0)
