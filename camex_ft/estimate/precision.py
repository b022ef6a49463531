"""Precision of a training step, as far as memory depends on it."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT, HALF, BYTE = 4, 2, 1


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Precision of a step.

    Attributes:
        half: under bf16 or fp16 autocast.
        gpu: with the kernels of a GPU.
        checkpointing: blocks are run again in the backward pass.
        optimizer: name of the Trainer's.
    """

    half: bool = False
    gpu: bool = False
    checkpointing: bool = False
    optimizer: str = "adamw_torch_fused"

    @property
    def size(self) -> int:
        """Bytes of a number that a matrix reads."""
        return HALF if self.half else FLOAT

    @property
    def mask(self) -> int:
        """Bytes of a number's place in a dropout mask."""
        return BYTE if self.gpu else self.size
