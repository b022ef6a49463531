"""The Trainer's evaluations: what is collected of a data set, scored by the task, with the routing of its rows.

Each row counts once, whatever the batch size and the number of processes. The loss is the mean over all targets of the
data set: tokens of a text, else rows. Evaluation in half precision (`bf16_full_eval`, `fp16_full_eval`) is autocast:
the weights stay as they are.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, TrainingArguments
from transformers.trainer_pt_utils import nested_detach
from transformers.trainer_utils import EvalLoopOutput

from camex_ft.backbones.base import generates
from camex_ft.training.batch_size import BatchSizeTrainer
from camex_ft.training.monitor import by_sequence
from camex_ft.upcycling import routing_context

Score = Callable[[str, Any], Mapping[str, float]]
Outputs = Callable[[Any, Mapping[str, Any]], tuple[Tensor | None, Any]]
IGNORED = -100  # label of a token that is no target


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
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *others: Any,
        outputs: Outputs = loss_and_logits,
        score: Score | None = None,
        **kwargs: Any,
    ) -> None:
        self.outputs, self.score = outputs, score
        self._losses: list[Tensor] = []  # of an evaluation's batches: sum over the targets and their number
        args, self.evaluation_dtype = _half_evaluation(args)
        self.routing: dict[str, np.ndarray] = {}
        self.outcome: Any = None
        self.evaluating = 0.0
        self._evaluated: str | None = None
        kwargs = {"compute_metrics": self._metrics if score else None, **kwargs}
        super().__init__(model, args, *others, **kwargs)
        trained = cast(PreTrainedModel, self.model)
        self.context = routing_context(trained)
        # a causal language model predicts a token from those before it
        self.shifts_labels = generates(trained) and not trained.config.is_encoder_decoder
        knows = "use_cache" in inspect.signature(trained.forward).parameters
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

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the batches of an evaluation, with all of its rows whatever `dataloader_drop_last` says."""
        with _every_row(self.args):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return the batches of a prediction, with all of its rows whatever `dataloader_drop_last` says."""
        with _every_row(self.args):
            return super().get_test_dataloader(test_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate, with the mean loss over all targets of all processes; transformers' own is a mean over batches.

        Parameters do not change meanwhile, so that what is computed from them alone is cached.
        """
        self._losses = []
        with nullcontext() if self.context is None else self.context.cached():
            made = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if not self._losses:
            return made
        sums = torch.stack(self._losses).cpu().double().sum(0)
        if self.args.world_size > 1:
            sums = cast(Tensor, self.accelerator.reduce(sums.to(self.args.device)))
        loss = {f"{metric_key_prefix}_loss": float(sums[0] / sums[1])} if sums[1] else {}
        return made._replace(metrics={**loss, **(made.metrics or {})})

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Return None, {outputs: what `outputs` collects, routing: weights by sequence [B, layers, N]}, a placeholder.

        None stands for the loss, which `evaluation_loop` adds up, and the placeholder for the labels, without which
        transformers asks for no metrics: `score` has its own.
        """
        inputs = {**self._prepare_inputs(inputs), **self.without_cache}
        with torch.no_grad(), self.compute_loss_context_manager(), self._precision():
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
                # a forward pass is taken by all processes or by none
                inputs = {k: v[: max(real, 1)] if isinstance(v, Tensor) else v for k, v in inputs.items()}
                loss = self.outputs(model, inputs)[0]
        if loss is not None:
            count = self._targets(inputs, loss) * (real != 0)
            # the mean over no targets is NaN
            self._losses.append(torch.stack([torch.where(count > 0, loss.detach().mean() * count, 0), count]))
        if prediction_loss_only:
            return None, None, None
        return None, nested_detach(made), first.new_zeros(len(first))

    def _precision(self) -> AbstractContextManager[Any]:
        if self.evaluation_dtype is None:
            return nullcontext()
        return torch.autocast(self.args.device.type, self.evaluation_dtype)

    def _real_rows(self, inputs: Mapping[str, Any]) -> int | None:
        """Return how many rows of the last batch are this process's own: the others fill it up.

        None where there are no others, in any process.
        """
        state = self.accelerator.gradient_state
        rows = next(len(given) for given in inputs.values() if isinstance(given, Tensor))
        if self.args.world_size <= 1 or not state.end_of_dataloader or state.remainder <= 0:
            return None
        return min(rows, max(0, state.remainder - self.args.process_index * rows))

    def _targets(self, inputs: Mapping[str, Any], loss: Tensor) -> Tensor:
        """Return over how many targets the loss of a batch is a mean: tokens or rows with a label; a number."""
        labels = inputs.get("labels")
        if labels is None:
            return loss.new_tensor(next(len(given) for given in inputs.values() if isinstance(given, Tensor)))
        if labels.is_floating_point():
            return loss.new_tensor(labels.numel())
        return (labels[:, 1:] if self.shifts_labels else labels).ne(IGNORED).sum().to(loss.dtype)

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        collected: Any = prediction.predictions
        self.routing, self.outcome = {}, collected["outputs"]
        if "routing" in collected and self.context is not None and self.context.last is not None:
            names = self.context.last.layers
            self.routing = {name: collected["routing"][:, i] for i, name in enumerate(names)}
        if self.score is None or self._evaluated is None:
            return {}
        return dict(self.score(self._evaluated, collected["outputs"]))


def _half_evaluation(
    args: TrainingArguments | None,
) -> tuple[TrainingArguments | None, torch.dtype | None]:
    """Return the arguments without evaluation in half precision, and the type of number that they asked for.

    transformers would cast the model itself, which is saved afterwards.
    """
    if args is None or not (args.fp16_full_eval or args.bf16_full_eval):
        return args, None
    whole = copy.copy(args)
    whole.fp16_full_eval = whole.bf16_full_eval = False
    return whole, torch.float16 if args.fp16_full_eval else torch.bfloat16


@contextmanager
def _every_row(args: TrainingArguments) -> Iterator[None]:
    dropped, args.dataloader_drop_last = args.dataloader_drop_last, False
    try:
        yield
    finally:
        args.dataloader_drop_last = dropped
