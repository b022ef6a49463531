"""The statistics of gradients that a protocol keeps, such as Fisher information, updated at every optimizer step."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from camex_ft.moe.layers.expert_linear import ExpertLinear
from camex_ft.training.distributed import whole
from camex_ft.utils.errors import UserError


class StatisticCallback(TrainerCallback):
    """Shows the gradients of an optimizer step, clipped and summed over micro-batches and processes, to the experts."""

    def __init__(self, model: nn.Module) -> None:
        self.linears = [m for m in model.modules() if isinstance(m, ExpertLinear) and m.statistic is not None]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the statistics.

        Raises:
            UserError: an engine holds the gradients elsewhere.
        """
        for linear in self.linears:
            if linear.experts.requires_grad and linear.experts.grad is None:
                raise UserError(
                    "this protocol keeps a running mean of squared gradients, which the training engine in use does "
                    "not leave with the parameters: train without DeepSpeed, with ddp or fsdp"
                )
            linear.observe(whole)
