"""What there is to launch on; torch is imported when it is asked."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from camex_ft.launching.placement import Placement

DEVICES = "CUDA_VISIBLE_DEVICES"


def gpus_here() -> int:
    """Return how many GPUs this process may use. It asks NVML, which leaves CUDA alone: `show` still has a say."""
    import torch

    return torch.cuda.device_count()


def show(placed: Placement) -> None:
    """Let this process see what it is to use: no GPU where the CPU was asked for; one GPU if it is to run alone."""
    if placed.device == "cpu":
        os.environ[DEVICES] = ""
    elif placed.all == 1:
        os.environ[DEVICES] = os.environ.get(DEVICES, "0").partition(",")[0].strip()
