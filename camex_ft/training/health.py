"""Watching over a run: a loss that is not finite ends it before it can spoil a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from camex_ft.utils.errors import UserError


class LossGuard:
    """Remembers the first step whose loss was not finite, without waiting for the device."""

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def observe(self, loss: Tensor, step: int) -> None:
        """Note the loss of an optimizer step, counted from 1."""
        bad = torch.where(torch.isfinite(loss.detach()), 0, step)
        self._first = bad if self._first is None else torch.where(self._first > 0, self._first, bad)

    def check(self) -> None:
        """Raise `UserError` if any loss so far was NaN or infinite."""
        step = 0 if self._first is None else int(self._first.item())
        if step:
            raise UserError(
                f"the training loss was NaN or infinite at step {step}, so training stopped there; checkpoints from "
                "before are kept. Usually a lower training.learning_rate, a lower training.max_grad_norm or more "
                "training.warmup_steps helps"
            )
