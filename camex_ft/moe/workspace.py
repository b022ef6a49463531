"""Working memory that is used again: on a CPU, touching fresh memory can cost more than computing on it.

A name stands for one buffer of a thread, valid until the same name is asked for again. A GPU's allocator does this by
itself, and what is very large is allocated afresh, so that little memory is held.
"""

from __future__ import annotations

import math
import threading

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
    plain = type(like) in (Tensor, nn.Parameter)  # not one that stands for another
    if like.device.type != "cpu" or torch.is_inference_mode_enabled() or not plain:
        return like.new_empty(shape)
    needed = size * like.element_size()
    buffers = _local.buffers
    found = buffers.get(name)
    if found is None or found.numel() < needed:
        held = sum(b.numel() for n, b in buffers.items() if n != name)
        if held + needed > LIMIT:
            return like.new_empty(shape)
        found = buffers[name] = torch.empty(needed, dtype=torch.uint8)
    return found[:needed].view(like.dtype).view(shape)
