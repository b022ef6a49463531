"""Working memory: buffers that are reused.

On a CPU, touching fresh memory can cost more than computing on it. A name stands for one buffer of a thread, valid
until the same name is requested again. A GPU's allocator reuses memory itself, and very large buffers are allocated
afresh, so that a thread holds little memory.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# bytes that one thread may hold
LIMIT = 512 << 20


class _Local(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}


_local = _Local()


def workspace(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return a tensor of this shape, in dtype and on the device of `like`, with arbitrary content."""
    size = math.prod(shape)
    plain = type(like) in (Tensor, nn.Parameter)  # not a subclass such as a fake tensor
    if like.device.type != "cpu" or torch.is_inference_mode_enabled() or not plain:
        return like.new_empty(shape)
    needed = size * like.element_size()
    buffers = _local.buffers
    buffer = buffers.get(name)
    if buffer is None or buffer.numel() < needed:
        held = sum(b.numel() for n, b in buffers.items() if n != name)
        if held + needed > LIMIT:
            return like.new_empty(shape)
        buffer = buffers[name] = torch.empty(needed, dtype=torch.uint8)
    return buffer[:needed].view(like.dtype).view(shape)


def workspaces(name: str, shapes: Sequence[tuple[int, ...]], like: Tensor) -> list[Tensor]:
    """Return one tensor for each shape, named `name0`, `name1` and so on."""
    return [workspace(f"{name}{i}", shape, like) for i, shape in enumerate(shapes)]
