"""Measurements of a training in progress: routing, curvature, rows and tokens, expert statistics, finite losses.

Each is a callback that begins anew with each training. `CamexTrainer` hands it batches, routing and losses, which
transformers' events do not carry. Sums stay on the device and are read when a step is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import find_batch_size

from camex_ft.moe.context import LayerRouting
from camex_ft.moe.curvature import Curvature, condition_number, distance_from_identity
from camex_ft.moe.layers.expert_linear import ExpertLinear
from camex_ft.training.distributed import count_over_processes, total, whole
from camex_ft.upcycling import expert_layers
from camex_ft.utils.errors import UserError
from camex_ft.utils.routing_health import routing_warnings

log = logging.getLogger(__name__)
ROUNDING = 1e-3  # more than rounding takes from a sum of weights


class RoutingMonitor(TrainerCallback):
    """Sums of each layer's routing entropy and load over the steps between two log lines.

    Attributes:
        sums: since the last log line, by layer: entropy, number of groups, load; [2 + N].
        loads: share of the groups whose largest routing weight is each expert's, [N], by layer, at the last log line.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sums: dict[str, Tensor] = {}
        self.loads: dict[str, list[float]] = {}
        self.warned: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin without sums."""
        self.sums, self.loads, self.warned = {}, {}, set()

    def check_sums(self, sums: Any) -> None:
        """Raise `ValueError` unless `sums` are those of some of the model's layers."""
        layers = expert_layers(self.model)
        if not isinstance(sums, dict) or not sums.keys() <= layers.keys():
            raise ValueError(f"routing is {sums!r:.80}, expected tensors by layer")
        for name, values in sums.items():
            count = 2 + layers[name].settings.experts
            if not isinstance(values, Tensor) or values.shape != (count,):
                raise ValueError(f"routing of {name} is {values!r:.80}, expected {count} numbers")

    @torch.no_grad()
    def observe(self, layers: Mapping[str, LayerRouting]) -> None:
        """Add the routing of one forward pass."""
        for name, layer in layers.items():
            s = layer.weights.flatten(0, -2)  # [groups, N]
            mask = s.new_ones(len(s)) if layer.mask is None else layer.mask.flatten().to(s.dtype)
            p = scaled_to_one(s)
            entropy = -(torch.xlogy(p, p).sum(-1) * mask).sum()
            load = (nn.functional.one_hot(s.argmax(-1), s.shape[-1]) * mask.unsqueeze(-1)).sum(0)
            values = torch.cat([entropy.view(1), mask.sum().view(1), load])
            self.sums[name] = self.sums[name].to(values.device) + values if name in self.sums else values

    def summary(self) -> dict[str, float]:
        """Return the values of a log line and begin new sums; each layer's shares stay in `loads`.

        They are the entropy (nats, mean over layers), the largest share that one expert has of a layer's groups, and
        the largest distance of a curvature from the identity, of the global batches: every process has to call this.
        """
        values: dict[str, float] = {}
        self.loads = {}
        if self.sums:
            device = next(iter(self.sums.values())).device  # a model may lie on several
            flat = torch.cat([sums.to(device) for sums in self.sums.values()])
            parts = total(flat).split([len(sums) for sums in self.sums.values()])
            entropies = torch.stack([part[0] / part[1].clamp_min(1) for part in parts])
            shares = [part[2:] / part[1].clamp_min(1) for part in parts]
            self.loads = {n: share.tolist() for n, share in zip(self.sums, shares, strict=True)}
            largest = max(max(shares) for shares in self.loads.values())
            self._warn(dict(zip(self.sums, entropies.tolist(), strict=True)))
            values = {"routing_entropy": float(entropies.mean()), "routing_max_load": largest}
        distances = [d for layer in curvature_statistics(self.model).values() for d in layer["distance"]]
        if distances:
            values["curvature_distance"] = max(distances)
        self.sums = {}
        return values

    def _warn(self, entropies: Mapping[str, float]) -> None:
        """Log a warning about routing once for each training, in the first process."""
        for warning in routing_warnings(entropies, self.loads):
            if warning not in self.warned and PartialState().is_main_process:
                log.warning(warning)
            self.warned.add(warning)


def scaled_to_one(s: Tensor) -> Tensor:
    """Return routing weights [..., N] with rows that sum to less than 1, as after a softmax over all, scaled to 1."""
    total = s.sum(-1, keepdim=True)
    return s / torch.where((total > 0) & (total < 1 - ROUNDING), total, 1)


def by_sequence(layer: LayerRouting) -> Tensor:
    """Return the mean routing weights of each sequence's groups; [B, N]."""
    weights = layer.weights
    if weights.dim() == 2:
        return weights
    if layer.mask is None:
        return weights.mean(1)
    mask = layer.mask.to(weights.dtype).unsqueeze(-1)  # [B, groups, 1]
    return (weights * mask).sum(1) / mask.sum(1).clamp_min(1)


def curvature_statistics(model: nn.Module, *, condition: bool = False) -> dict[str, dict[str, list[float]]]:
    """Return, by layer and expert, ``distance`` ||M - I||_F / ||I||_F and, on request and if cheap, ``condition``.

    A layer's matrices are taken together: the mean over them of the distance, the largest of the condition numbers.
    """
    statistics: dict[str, dict[str, list[float]]] = {}
    for name, layer in expert_layers(model).items():
        curvatures = [linear.curvature for linear in layer.linears.values()]
        sharded: list[Any] = [c.factors for c in curvatures if isinstance(c, Curvature)]
        factors = [type(f)(*[whole(tensor).detach() for tensor in f]) for f in sharded]
        if not factors:
            continue
        distances = torch.stack([distance_from_identity(f) for f in factors])
        statistics[name] = {"distance": distances.mean(0).tolist()}
        conditions = [condition_number(f) for f in factors] if condition else []
        known = [c for c in conditions if c is not None]
        if known:
            statistics[name]["condition"] = torch.stack(known).amax(0).tolist()
    return statistics


class Speed(NamedTuple):
    """Training's rows and tokens (of inputs, without padding) a second, without evaluations."""

    samples: float
    tokens: float


class Progress(TrainerCallback):
    """Counts of a training: what this process has read, and the time that evaluations took.

    Attributes:
        rows, tokens: read since training began or was resumed; tokens of inputs, without padding.
        micro_batch: number of the forward pass within its optimizer step, from 1.
        evaluating: seconds spent on evaluations.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.rows, self.evaluating = 0, 0.0
        self.tokens: Tensor | int = 0
        self.micro_batch, self._step, self._step_rows = 0, -1, 0
        self._largest_step = 0
        self.largest_step_before = 0  # over all processes, in the steps before those that were resumed from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count from zero."""
        self._begin()

    def count(self, inputs: Mapping[str, Any], step: int) -> None:
        """Add the micro-batch of a step."""
        if step != self._step:
            self._step, self._step_rows, self.micro_batch = step, 0, 0
        rows = cast(int, find_batch_size(cast(Any, inputs)))
        self.micro_batch += 1
        self.rows += rows
        self._step_rows += rows
        self._largest_step = max(self._largest_step, self._step_rows)
        if "attention_mask" in inputs:  # read at the end: the device need not wait
            self.tokens = inputs["attention_mask"].sum() + self.tokens

    def largest_step(self) -> int:
        """Return the rows of the largest step since training was resumed; every process has to call this."""
        return count_over_processes(self._largest_step)

    def speed(self, seconds: float) -> Speed | None:
        """Return the speed of a training that took `seconds` with its evaluations; every process has to call this."""
        rows, tokens = count_over_processes(self.rows), count_over_processes(self.tokens)
        training = seconds - self.evaluating
        return Speed(rows / training, tokens / training) if training > 0 and rows else None


class LossGuard(TrainerCallback):
    """Memory of the first step with a loss that is not finite, without waiting for the device."""

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier training."""
        self._first = None

    def observe(self, loss: Tensor, step: int) -> None:
        """Note the loss of an optimizer step, counted from 1."""
        bad = torch.where(torch.isfinite(loss.detach()), 0, step)
        self._first = bad if self._first is None else torch.where(self._first > 0, self._first, bad)

    def check(self) -> None:
        """Raise `UserError` if any loss so far was NaN or infinite."""
        step = 0 if self._first is None else int(self._first.item())
        if step:
            raise UserError(
                f"the training loss was NaN or infinite at step {step}, so training stopped there; earlier "
                "checkpoints stay. Usually a lower training.learning_rate, a lower training.max_grad_norm or more "
                "training.warmup_steps helps"
            )


class ExpertStatistics(TrainerCallback):
    """Update of the statistics of gradients that a protocol asks for, such as Fisher information, at each step.

    The gradients are those of an optimizer step: clipped, and summed over micro-batches and processes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.linears = [m for m in model.modules() if isinstance(m, ExpertLinear) and m.statistic is not None]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the statistics.

        Raises:
            UserError: the training engine stores the gradients elsewhere.
        """
        for linear in self.linears:
            if linear.experts.requires_grad and linear.experts.grad is None:
                raise UserError(
                    "this protocol needs a running mean of squared gradients, which the training engine in use does "
                    "not leave with the parameters: train without DeepSpeed, with ddp or fsdp"
                )
            linear.observe(whole)
