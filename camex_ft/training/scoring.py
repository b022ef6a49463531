"""The Trainer's evaluations: what is collected of a data set, scored by the task, with the routing of its rows.

Each row counts once, in the loss as well, whatever the number of processes.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel
from transformers.trainer_pt_utils import nested_detach

from camex_ft.training.batch_size import BatchSizeTrainer
from camex_ft.training.monitor import by_sequence
from camex_ft.upcycling import routing_context

Score = Callable[[str, Any], Mapping[str, float]]
Outputs = Callable[[Any, Mapping[str, Any]], tuple[Tensor | None, Any]]


def loss_and_logits(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor | None, Any]:
    """Return the model's loss, or None without labels, and its logits [B, ...]."""
    made = model(**inputs)
    return (made.loss if "labels" in inputs else None), made.logits


class ScoringTrainer(BatchSizeTrainer):
    """`BatchSizeTrainer` that scores what a task collects of each data set.

    Args:
        outputs, score, args, kwargs: as of `CamexTrainer`.

    Attributes:
        context: of the model, or None where no layer has experts.
        routing: after an evaluation, each layer's routing weights by sequence, {layer: [n, N]}, in the data's order.
        outcome: after an evaluation, what was collected.
        evaluating: seconds spent on evaluations.
    """

    def __init__(
        self, *args: Any, outputs: Outputs = loss_and_logits, score: Score | None = None, **kwargs: Any
    ) -> None:
        self.outputs, self.score = outputs, score
        self.routing: dict[str, np.ndarray] = {}
        self.outcome: Any = None
        self.evaluating = 0.0
        self._evaluated: str | None = None
        super().__init__(*args, **{"compute_metrics": self._metrics if score else None, **kwargs})
        model = cast(PreTrainedModel, self.model)
        self.context = routing_context(model)
        knows = "use_cache" in inspect.signature(model.forward).parameters
        self.without_cache = {"use_cache": False} if knows else {}  # nothing here reads one

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate each data set under its name."""
        self._evaluated = eval_dataset if isinstance(eval_dataset, str) else None
        # then each comes through here by itself
        several = eval_dataset is None and isinstance(self.eval_dataset, dict)
        started = time.perf_counter()
        metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        self.evaluating += 0.0 if several else time.perf_counter() - started
        return metrics

    def collect(self, dataset: Any) -> Any:
        """Return what `outputs` collects of a data set, in its order: an array or tuple of arrays [n, ...]."""
        self._evaluated = None
        collected: Any = self.predict(dataset).predictions
        return collected["outputs"]

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Return loss, {outputs: what `outputs` collects, routing: weights by sequence [B, layers, N]}, a placeholder.

        The placeholder stands for the labels, without which transformers asks for no metrics: `score` has its own.
        """
        inputs = {**self._prepare_inputs(inputs), **self.without_cache}
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, collected = self.outputs(model, inputs)
            first = collected[0] if isinstance(collected, (tuple, list)) else collected
            made = {"outputs": collected}
            if self.context is not None and self.context.last is not None:
                layers = self.context.last.layers.values()
                made["routing"] = torch.stack([by_sequence(layer) for layer in layers], dim=1).to(
                    first.device
                )
            real = self._real_rows(inputs)
            if real is not None and loss is not None:
                own = {k: v[:real] if isinstance(v, Tensor) else v for k, v in inputs.items()}
                loss = self.outputs(model, own)[0]
        loss = None if loss is None else loss.detach().mean()
        if prediction_loss_only:
            return loss, None, None
        return loss, nested_detach(made), first.new_zeros(len(first))

    def _real_rows(self, inputs: Mapping[str, Any]) -> int | None:
        """Return how many rows of the last batch are this process's own, at least 1: the others fill it up.

        None where there are no others, in any process: a forward pass is taken by all or by none.
        """
        state = self.accelerator.gradient_state
        rows = next(len(given) for given in inputs.values() if isinstance(given, Tensor))
        if self.args.world_size <= 1 or not state.end_of_dataloader or state.remainder <= 0:
            return None
        return min(rows, max(1, state.remainder - self.args.process_index * rows))

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        collected: Any = prediction.predictions
        self.routing, self.outcome = {}, collected["outputs"]
        if "routing" in collected and self.context is not None and self.context.last is not None:
            names = self.context.last.layers
            self.routing = {name: collected["routing"][:, i] for i, name in enumerate(names)}
        if self.score is None or self._evaluated is None:
            return {}
        return dict(self.score(self._evaluated, collected["outputs"]))
