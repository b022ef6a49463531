"""The Trainer: transformers' own, with balance losses, learning rates and statistics for layers with experts.

training loss = the model's loss + sum over layers of the balance loss          (evaluation: the model's loss alone)

With `label_smoothing_factor` the training loss has smoothed targets; that of an evaluation has the targets as they are.

Of an optimizer step's micro-batches, heads for classification average the means of each, and language models average
over all tokens that are predicted; the balance loss is always the mean over the micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import LengthGroupedSampler, find_batch_size
from transformers.training_args import OptimizerNames

from camex_ft.backbones.base import generates
from camex_ft.training.cost import Speed
from camex_ft.training.distributed import total
from camex_ft.training.health import LossGuard
from camex_ft.training.monitor import RoutingMonitor
from camex_ft.training.order import EpochSampler
from camex_ft.training.scoring import ScoringTrainer
from camex_ft.training.statistic import StatisticCallback
from camex_ft.utils.errors import UserError

CURVATURE, ROUTER, TEMPERATURE = ".curvature.", ".router.", ".router.log_temperature"


class CamexTrainer(ScoringTrainer):
    """`transformers.Trainer` for models with or without experts.

    Args:
        outputs: model and inputs of an evaluation batch -> loss or None, and what is collected of it: a tensor or
            tuple of tensors [B, ...]. Routing is read from its last forward pass.
        score: name of an evaluation data set and what was collected of it, in order -> metrics.
        router_learning_rate, curvature_learning_rate: of those parameters; None: as the others.
        args, kwargs: as of `transformers.Trainer`; `eval_dataset` maps names to data sets.

    After an evaluation `routing` holds each layer's routing weights by sequence, {layer: [n, N]}, in the data's order.
    """

    def __init__(
        self,
        *args: Any,
        router_learning_rate: float | None = None,
        curvature_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.rates = {ROUTER: router_learning_rate, CURVATURE: curvature_learning_rate}
        self._count_from_zero()
        _name_loss(args[0] if args else kwargs.get("model"))
        super().__init__(*args, **kwargs)
        trained = cast(PreTrainedModel, self.model)
        if self.context is not None and self.args.n_gpu > 1:
            raise UserError(
                f"one process sees {self.args.n_gpu} GPUs: its replicas' balance losses would be lost. Start one "
                f"process a GPU, camex-ft run ... --gpus {self.args.n_gpu}, or use one, --gpus 1"
            )
        self.monitor = RoutingMonitor(trained)
        self.add_callback(StatisticCallback(trained))
        # heads for classification average over the micro-batch whatever they are told of the whole batch
        self.model_accepts_loss_kwargs &= generates(trained)
        # and so do encoder-decoders: `compute_loss` weights their micro-batches
        self.weighs = self.model_accepts_loss_kwargs and trained.config.is_encoder_decoder

    def _count_from_zero(self) -> None:
        self.tokens: Tensor | int = 0  # of inputs, without padding
        self.rows = self._largest_step = 0
        self._largest_before = 0  # in the steps before those that a run went on from
        self._step_rows = -1, 0  # the step that is under way, and its rows so far
        self.evaluating = 0.0
        self._passes = 0, 0  # the step that is under way, and its forward passes so far
        self.guard = LossGuard()

    def start_over(self) -> None:
        """Forget everything about the training so far but the model."""
        super().start_over()
        self._count_from_zero()
        self.monitor = RoutingMonitor(self.monitor.model)
        if self.context is not None:
            self.context.forget()

    # -- loss ---------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the model's loss, and in training the balance losses with it."""
        inputs = {**inputs, **self.without_cache}
        labels = inputs.get("labels")
        if self.label_smoother is not None and labels is not None:
            inputs = {**inputs, **self._decoder_inputs(labels)}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        if scaled and self.weighs and labels is not None and self.label_smoother is None:
            loss = loss * (labels != -100).sum() / num_items_in_batch
        if model.training and self.context is not None and self.context.last is not None:
            self.monitor.observe(self.context.last.layers)
            balance = self.context.last.balance_loss(total)
            if balance is not None:
                parts = (
                    self.current_gradient_accumulation_steps if scaled else 1
                )  # else the Trainer divides the sum
                loss = loss + balance.to(loss.device) / parts
        return (loss, outputs) if return_outputs else loss

    def _decoder_inputs(self, labels: Tensor) -> dict[str, Tensor]:
        """Return what a decoder reads, which it takes from the labels where they are not held back for smoothing."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if not generates(model) or not model.config.is_encoder_decoder:
            return {}
        return {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels)}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Take one forward and backward pass; a loss that is not finite ends the run (`UserError`)."""
        self._count(inputs)
        with self._micro_batch(), self._seeded():
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.guard.observe(loss, self.state.global_step + 1)
        if loss.device.type == "cpu":
            self.guard.check()
        return loss

    def _count(self, inputs: dict[str, Any]) -> None:
        rows = cast(int, find_batch_size(inputs))
        step, before = self._step_rows
        self._step_rows = self.state.global_step, rows + before * (step == self.state.global_step)
        self.rows += rows
        self._largest_step = max(self._largest_step, self._step_rows[1])
        if "attention_mask" in inputs:
            self.tokens = (
                inputs["attention_mask"].sum() + self.tokens
            )  # read at the end: the device need not wait

    def _micro_batch(self) -> AbstractContextManager[None]:
        """Share domain vectors over the micro-batches of a step, where no engine takes parameters apart."""
        alone = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        if (
            self.context is None
            or self.args.gradient_accumulation_steps <= 1
            or alone
            or not self.whole_parameters
        ):
            return nullcontext()
        return self.context.micro_batch(last=self.accelerator.sync_gradients)

    def _seeded(self) -> AbstractContextManager[None]:
        """Draw what is random about domain vectors alike in every process, and the same after going on from here."""
        if self.context is None:
            return nullcontext()
        step, passes = self._passes
        self._passes = self.state.global_step, passes + 1 if step == self.state.global_step else 1
        seed = (self.args.seed << 64) + (self._passes[0] << 16) + self._passes[1]
        return self.context.seeded(seed)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, counting rows, tokens and the time of evaluations from zero."""
        self._count_from_zero()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add routing entropy, load and distance of the curvature from the identity to a training step's log.

        The closing line gets the rows a second that were counted; transformers' own are those of full batches.
        """
        if logs.get("train_runtime"):
            logs["train_samples_per_second"] = round(
                self._over_processes(self.rows) / logs["train_runtime"], 3
            )
        if "loss" in logs:
            self.guard.check()
            logs = {**logs, **self.monitor.summary()}
        super().log(logs, *args, **kwargs)

    def _write(self, *, extra: bool = False) -> None:
        self.guard.check()  # a model that is not finite any more never replaces a good checkpoint
        super()._write(extra=extra)

    def summed_up(self) -> dict[str, Any]:
        """Return what this process has summed up, with the routing since the last log line."""
        return {
            **super().summed_up(),
            "routing": self.monitor.sums,
            "rows_a_step": self._over_processes(self._largest_step),
        }

    def check_sums(self, kept: dict[str, Any]) -> None:
        """Raise `ValueError` unless `kept` has the form of what `summed_up` returns."""
        super().check_sums(kept)
        self.monitor.check(kept.get("routing"))

    def take_up(self, kept: list[dict[str, Any]], own: int | None) -> None:
        """Take up what every process had summed up."""
        super().take_up(kept, own)
        self._largest_before = kept[0].get("rows_a_step", 0)  # earlier versions did not count
        routing = [each["routing"] for each in kept]
        if own is None:
            first = self.args.process_index == 0  # the others begin with nothing, of the same layers
            added = {layer: torch.stack([sums[layer] for sums in routing]).sum(0) for layer in routing[0]}
            self.monitor.sums = {n: s if first else torch.zeros_like(s) for n, s in added.items()}
        else:
            self.monitor.sums = routing[own]

    def finish(self, checkpoint: Path) -> None:
        """Take up a run whose training had come to its end at `checkpoint`: its state, and the weights that it kept.

        Going on from there would take one step too many.
        """
        self.take_up_the_end(checkpoint)
        if self.args.auto_find_batch_size and self.state.train_batch_size:
            self.args.per_device_train_batch_size = self.state.train_batch_size  # what was found
        self._shard_unprepared()
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(str(checkpoint.parent / Path(best).name if best else checkpoint))

    @property
    def keeps_best(self) -> bool:
        """Return whether the model is that of the best evaluation, and not that of the last step."""
        return self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None

    def speed(self, metrics: Mapping[str, float]) -> Speed | None:
        """Return the speed of the training that `metrics`, those of `train`, are of, without its evaluations."""
        rows, tokens = self._over_processes(self.rows), self._over_processes(self.tokens)
        training = metrics.get("train_runtime", 0.0) - self.evaluating
        return Speed(rows / training, tokens / training) if training > 0 and rows else None

    def rows_a_step(self) -> int | None:
        """Return how many rows the largest optimizer step took, over all processes; every process has to ask for it.

        None for a training that had come to its end before it went on, where its checkpoint does not tell.
        """
        return max(self._over_processes(self._largest_step), self._largest_before) or None

    def _over_processes(self, count: Tensor | int) -> int:
        """Return the sum of every process's count."""
        if self.args.world_size <= 1:
            return int(count)
        return int(cast(Tensor, self.accelerator.reduce(torch.as_tensor(count, device=self.args.device))))

    # -- optimizer ----------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Give router and curvature learning rates of their own, and what does not start at 0 no weight decay."""
        if self.optimizer is not None:
            return self.optimizer
        names = {id(p): n for n, p in cast(nn.Module, model or self.model).named_parameters()}
        try:
            optimizer = super().create_optimizer(model)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(
                f"training.optim: {OptimizerNames(self.args.optim).value} cannot be used: {error}"
            ) from error
        optimizer.param_groups[:] = [
            part for group in optimizer.param_groups for part in self._split(group, names)
        ]
        return optimizer

    def _split(self, group: dict[str, Any], names: Mapping[int, str]) -> list[dict[str, Any]]:
        parts: dict[str, list[nn.Parameter]] = {"": [], TEMPERATURE: [], ROUTER: [], CURVATURE: []}
        for parameter in group["params"]:
            name = names.get(id(parameter), "")
            parts[next((key for key in parts if key and key in name), "")].append(parameter)
        made = []
        for key, parameters in parts.items():
            if parameters:
                rate = self.rates.get(ROUTER if key == TEMPERATURE else key) or group["lr"]
                decay = 0.0 if key in (CURVATURE, TEMPERATURE) else group["weight_decay"]
                made.append({**group, "params": parameters, "lr": rate, "weight_decay": decay})
        return made

    # -- order of the data --------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches of training; `UserError` where there is none."""
        loader = super().get_train_dataloader()
        if len(loader) == 0:
            full = self.args.train_batch_size * self.args.world_size
            raise UserError(
                f"training.dataloader_drop_last: {len(cast(Any, self.train_dataset))} training rows do not fill a "
                f"batch of {full}, so that none is left: expected false, or a smaller per_device_train_batch_size"
            )
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= (
                self.args.world_size
            )  # rows of one length for the whole step: the same order anywhere
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return EpochSampler(sampler, seed)
        return sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        """Keep the order of the rows, which predictions are scored against."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


def _name_loss(model: Any) -> None:
    """Name the loss of causal language models whose class does not tell, as GPT-2's: a row's first token has none."""
    if model is not None and generates(model) and not model.config.is_encoder_decoder and not model.loss_type:
        model.loss_type = "ForCausalLM"
