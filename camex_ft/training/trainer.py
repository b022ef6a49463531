"""The Trainer: transformers' own, with balance losses, learning rates and evaluations for layers with experts.

training loss = the model's loss + sum over layers of the balance loss          (evaluation: the model's loss alone)

With `label_smoothing_factor` the training loss has smoothed targets, and that of an evaluation the targets themselves.

Of an optimizer step's micro-batches, heads for classification average the means, and language models average over all
predicted tokens; the balance loss is always the mean over the micro-batches.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler, nested_detach
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from camex_ft.backbones.base import generates
from camex_ft.training import signals
from camex_ft.training.batches import (
    LESS,
    EpochOrder,
    EpochSampler,
    MeanLoss,
    Outputs,
    Score,
    TrainingStart,
    every_row_in_order,
    half_evaluation,
    loss_and_logits,
    out_of_memory,
    real_rows,
)
from camex_ft.training.callbacks.monitoring import (
    ExpertStatistics,
    LossGuard,
    Progress,
    RoutingMonitor,
    Speed,
    by_sequence,
)
from camex_ft.training.checkpointing import CheckpointManager
from camex_ft.training.distributed import count_over_processes, prepare_model, shard_on_cpu, tied, total
from camex_ft.upcycling import routing_context
from camex_ft.upcycling.adapters import has_adapter, trained_state
from camex_ft.utils.errors import UserError

CURVATURE, ROUTER, TEMPERATURE = ".curvature.", ".router.", ".router.log_temperature"
logger = logging.get_logger(__name__)


class CamexTrainer(Trainer):
    """`transformers.Trainer` for models with or without experts, on any number of processes.

    Args:
        args, kwargs: as of `transformers.Trainer`; `eval_dataset` maps names to data sets.
        outputs: model and inputs of an evaluation batch -> loss or None, and the outputs to collect: a tensor or
            tuple of tensors [B, ...]. Routing is read from its last forward pass.
        score: name of an evaluation data set and its collected outputs, in order -> metrics.
        router_learning_rate, curvature_learning_rate: of those parameters; None: as of the others.

    Attributes:
        context: routing context of the model, or None where no layer has experts.
        monitor, progress, guard: measurements of the training in progress.
        checkpoints: writes and restores checkpoints.
        routing: after an evaluation, each layer's routing weights by sequence, {layer: [n, N]}, in the data's order.
        outcome: after an evaluation, the collected outputs.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *others: Any,
        outputs: Outputs = loss_and_logits,
        score: Score | None = None,
        router_learning_rate: float | None = None,
        curvature_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.outputs, self.score = outputs, score
        self.learning_rates = {ROUTER: router_learning_rate, CURVATURE: curvature_learning_rate}
        self.routing: dict[str, np.ndarray] = {}
        self.outcome: Any = None
        self._evaluated: str | None = None  # name of the data set under evaluation
        # GPT-2's class has no loss type: a row's first token is no target
        if generates(model) and not model.config.is_encoder_decoder and not model.loss_type:
            model.loss_type = "ForCausalLM"
        args, self.evaluation_dtype = half_evaluation(args)
        kwargs = {"compute_metrics": self.compute_scores if score else None, **kwargs}
        super().__init__(model, args, *others, **kwargs)
        model = cast(PreTrainedModel, self.model)
        self.context = routing_context(model)
        if self.context is not None and self.args.n_gpu > 1:
            raise UserError(
                f"one process sees {self.args.n_gpu} GPUs: its replicas' balance losses would be lost. Start one "
                f"process a GPU, camex-ft run ... --gpus {self.args.n_gpu}, or use one, --gpus 1"
            )
        self.monitor, self.progress, self.guard = RoutingMonitor(model), Progress(), LossGuard()
        self.checkpoints = CheckpointManager(
            self, routing=self.monitor, progress=self.progress, guard=self.guard
        )
        for callback in (self.monitor, self.progress, self.guard, ExpertStatistics(model), EpochOrder()):
            self.add_callback(callback)
        self.add_callback(self.checkpoints)
        # heads for classification average over the micro-batch whatever they are told of the whole batch
        self.model_accepts_loss_kwargs &= generates(model)
        # and so do encoder-decoders: `compute_loss` weights their micro-batches
        self.weights_micro_batches = self.model_accepts_loss_kwargs and model.config.is_encoder_decoder
        self.mean_loss = MeanLoss(shifts_labels=generates(model) and not model.config.is_encoder_decoder)
        caches = "use_cache" in inspect.signature(model.forward).parameters
        self.without_cache = {"use_cache": False} if caches else {}

    # -- engines ------------------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator; a model is sharded block by block."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled |= shard_on_cpu(self.accelerator)
        prepare_model(cast(PreTrainedModel, self.model), self.accelerator)

    @property
    def whole_parameters(self) -> bool:
        """Return whether every process has all parameters, and their gradients after each backward pass."""
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    @property
    def engine(self) -> str | None:
        """The engine of several processes: ddp, fsdp, zero2 or zero3; None for one process."""
        if self.is_deepspeed_enabled:
            return f"zero{self.accelerator.state.deepspeed_plugin.zero_stage}"
        if self.is_fsdp_enabled:
            return "fsdp"
        return "ddp" if self.args.world_size > 1 else None

    def full_state(self) -> dict[str, Tensor] | None:
        """Return the model's state if it has to be gathered, else None; every process has to call this."""
        if self.whole_parameters:
            return None
        return tied(cast(nn.Module, self.model), self.accelerator.get_state_dict(self.model_wrapped))

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, each process with its own randomness; a signal ends it after a saved step (`Stopped`)."""
        if self.args.world_size > 1:
            set_seed(self.args.seed, device_specific=True)
        try:
            with signals.postponed():
                return super().train(*args, **kwargs)
        except Exception as error:
            self.checkpoints.blame(error)
            raise

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run one forward and backward pass; a loss that is not finite ends the run (`UserError`)."""
        self.progress.count(inputs, self.state.global_step)
        with self._shared_vectors(), self._random_masks():
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.guard.observe(loss, self.state.global_step + 1)
        if loss.device.type == "cpu":
            self.guard.check()
        return loss

    def _shared_vectors(self) -> AbstractContextManager[None]:
        """Share domain vectors over the micro-batches of a step, where no engine shards parameters."""
        alone = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        several = self.args.gradient_accumulation_steps > 1
        if self.context is None or alone or not several or not self.whole_parameters:
            return nullcontext()
        return self.context.micro_batch(last=self.accelerator.sync_gradients)

    def _random_masks(self) -> AbstractContextManager[None]:
        """Draw random masks of domain vectors alike in every process, and the same in a resumed run."""
        if self.context is None:
            return nullcontext()
        step, micro_batch = self.state.global_step, self.progress.micro_batch
        return self.context.seeded((self.args.seed << 64) + (step << 16) + micro_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the model's loss, in training with the balance losses."""
        inputs = {**inputs, **self.without_cache}
        labels = inputs.get("labels")
        if self.label_smoother is not None and labels is not None:
            inputs = {**inputs, **self._decoder_inputs(labels)}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        if scaled and self.weights_micro_batches and labels is not None and self.label_smoother is None:
            loss = loss * (labels != -100).sum() / num_items_in_batch
        if model.training and self.context is not None and self.context.last is not None:
            self.monitor.observe(self.context.last.layers)
            balance = self.context.last.balance_loss(total)
            if balance is not None:  # if the loss is not scaled, transformers divides the sum
                parts = self.current_gradient_accumulation_steps if scaled else 1
                loss = loss + balance.to(loss.device) / parts
        return (loss, outputs) if return_outputs else loss

    def _decoder_inputs(self, labels: Tensor) -> dict[str, Tensor]:
        """Return a decoder's inputs, which it makes from labels itself unless they are held back for smoothing."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if not generates(model) or not model.config.is_encoder_decoder:
            return {}
        return {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels)}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer: own learning rates for router and curvature; curvature and temperature do not decay."""
        if self.optimizer is not None:
            return self.optimizer
        names = {id(p): n for n, p in cast(nn.Module, model or self.model).named_parameters()}
        try:
            optimizer = super().create_optimizer(model)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(
                f"training.optim: {OptimizerNames(self.args.optim).value} cannot be used: {error}"
            ) from error
        groups = [part for group in optimizer.param_groups for part in self._split_group(group, names)]
        optimizer.param_groups[:] = groups
        return optimizer

    def _split_group(self, group: dict[str, Any], names: Mapping[int, str]) -> list[dict[str, Any]]:
        """Return a parameter group as groups of the backbone, temperatures, routers and curvatures."""
        parts: dict[str, list[nn.Parameter]] = {"": [], TEMPERATURE: [], ROUTER: [], CURVATURE: []}
        for parameter in group["params"]:
            name = names.get(id(parameter), "")
            parts[next((key for key in parts if key and key in name), "")].append(parameter)
        groups = []
        for key, parameters in parts.items():
            if parameters:
                rate = self.learning_rates.get(ROUTER if key == TEMPERATURE else key) or group["lr"]
                decay = 0.0 if key in (CURVATURE, TEMPERATURE) else group["weight_decay"]
                groups.append({**group, "params": parameters, "lr": rate, "weight_decay": decay})
        return groups

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches of training; `UserError` if there is none."""
        loader = super().get_train_dataloader()
        if len(loader) == 0:
            full = self.args.train_batch_size * self.args.world_size
            raise UserError(
                f"training.dataloader_drop_last: {len(cast(Any, self.train_dataset))} training rows do not fill a "
                f"batch of {full}, so that none is left: expected false, or a smaller per_device_train_batch_size"
            )
        return loader

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add routing entropy, load and distance of the curvature from the identity to a training step's log.

        In the closing line, the rows a second are those that were counted, where transformers has full batches, and
        the loss is the mean over all steps, also those before training was resumed.
        """
        if logs.get("train_runtime"):
            rows = count_over_processes(self.progress.rows)
            logs["train_samples_per_second"] = round(rows / logs["train_runtime"], 3)
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        if "loss" in logs:
            self.guard.check()
            logs = {**logs, **self.monitor.summary()}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model and tokenizer; of a model with low-rank experts, what is trained. Every process has to call this.

        Unlike transformers', it writes no pickled arguments.
        """
        model, state = cast(PreTrainedModel, self.model), self.full_state()
        if not self.args.should_save:
            return
        if has_adapter(model):
            trained = trained_state(model)
            state = {name: (state or trained)[name] for name in trained}
        folder = output_dir or cast(str, self.args.output_dir)
        model.save_pretrained(folder, state_dict=state)
        if self.processing_class is not None:
            cast(Any, self.processing_class).save_pretrained(folder)

    def check(self, checkpoint: Path) -> None:
        """Raise `UserError` where a run cannot resume from a checkpoint with its current processes."""
        self.checkpoints.check(checkpoint)

    def finish(self, checkpoint: Path) -> None:
        """Restore a run whose training had ended at `checkpoint`: its state, and its best or last weights.

        Resuming there would train one step too many.
        """
        self.checkpoints.restore_end(checkpoint)
        if self.args.auto_find_batch_size and self.state.train_batch_size:
            self.args.per_device_train_batch_size = self.state.train_batch_size
        if self.is_fsdp_enabled and not self.accelerator._models:
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.create_optimizer())
            self.model_wrapped = cast(PreTrainedModel, self.model)
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self.checkpoints.load_weights(checkpoint.parent / Path(best).name if best else checkpoint)

    @property
    def keeps_best(self) -> bool:
        """Return whether the model is that of the best evaluation, and not that of the last step."""
        return self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None

    def speed(self, metrics: Mapping[str, float]) -> Speed | None:
        """Return the speed of the training with these `metrics`, without its evaluations."""
        return self.progress.speed(metrics.get("train_runtime", 0.0))

    def rows_a_step(self) -> int | None:
        """Return the rows of the largest optimizer step over all processes; every process has to call this.

        None for a training that had ended before it was resumed, if its checkpoint has no count.
        """
        return max(self.progress.largest_step(), self.progress.largest_step_before) or None

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate each data set under its name."""
        if self.checkpoints.resuming is not None:
            return {}  # `eval_on_start`, which the resumed run has done
        self._evaluated = eval_dataset if isinstance(eval_dataset, str) else None
        several = eval_dataset is None and isinstance(self.eval_dataset, dict)  # each is evaluated by a call
        started = time.perf_counter()
        try:
            metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        except RuntimeError as error:
            if self.is_in_train and self.args.auto_find_batch_size and out_of_memory(error):
                raise UserError(
                    f"an evaluation ran out of memory, and training.auto_find_batch_size is about training alone: "
                    f"expected training.per_device_eval_batch_size below {self.args.per_device_eval_batch_size}"
                ) from error
            raise
        self.progress.evaluating += 0.0 if several else time.perf_counter() - started
        return metrics

    def collect(self, dataset: Any) -> Any:
        """Return the `outputs` of a data set in its order: an array or tuple of arrays [n, ...]."""
        self._evaluated = None
        collected: Any = self.predict(dataset).predictions
        return collected["outputs"]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the batches of an evaluation: all rows in their order, whatever the settings of training."""
        with every_row_in_order(self.args):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return the batches of a prediction: all rows in their order, whatever the settings of training."""
        with every_row_in_order(self.args):
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

        Parameters do not change meanwhile, so that results that depend on them alone are cached.
        """
        self.mean_loss.sums = []
        with nullcontext() if self.context is None else self.context.cached():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        mean = self.mean_loss.over_processes(self.accelerator)
        loss = {} if mean is None else {f"{metric_key_prefix}_loss": mean}
        return output._replace(metrics={**loss, **(output.metrics or {})})

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Return None, {outputs: collected outputs, routing: weights by sequence [B, layers, N]}, and a placeholder.

        None stands for the loss, which `evaluation_loop` adds up, and the placeholder for the labels, without which
        transformers computes no metrics: `score` has its own.
        """
        inputs = {**self._prepare_inputs(inputs), **self.without_cache}
        dtype = self.evaluation_dtype
        precision = nullcontext() if dtype is None else torch.autocast(self.args.device.type, dtype)
        with torch.no_grad(), self.compute_loss_context_manager(), precision:
            loss, outputs = self.outputs(model, inputs)
            first = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
            collected = {"outputs": outputs}
            if self.context is not None and self.context.last is not None:
                layers = self.context.last.layers.values()
                routing = torch.stack([by_sequence(layer) for layer in layers], dim=1)
                collected["routing"] = routing.to(first.device)
            real = real_rows(inputs, self.accelerator)
            if real is not None and loss is not None:
                # a forward pass is taken by all processes or by none
                inputs = {k: v[: max(real, 1)] if isinstance(v, Tensor) else v for k, v in inputs.items()}
                loss = self.outputs(model, inputs)[0]
        if loss is not None:
            self.mean_loss.add(loss, inputs, real)
        if prediction_loss_only:
            return None, None, None
        return None, nested_detach(collected), first.new_zeros(len(first))

    def compute_scores(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the metrics of an evaluation, whose routing and outputs stay in `routing` and `outcome`."""
        collected: Any = prediction.predictions
        self.routing, self.outcome = {}, collected["outputs"]
        if "routing" in collected and self.context is not None and self.context.last is not None:
            names = self.context.last.layers
            self.routing = {name: collected["routing"][:, i] for i, name in enumerate(names)}
        if self.score is None or self._evaluated is None:
            return {}
        return dict(self.score(self._evaluated, collected["outputs"]))

    # -- private methods of transformers.Trainer, checked with 5.23.0 -------------------------------------------------
    #
    # Each says why no public hook does it. tests/training/test_trainer.py counts them.

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: TrainingArguments | None = None,
        resume_from_checkpoint: str | None = None,
        *others: Any,
        **kwargs: Any,
    ) -> Any:
        """Train from the start again with half the rows where `auto_find_batch_size` meets a full memory.

        transformers repeats this method with fewer rows, from weights that the failed attempt has changed. `train`,
        the public one, cannot be repeated: it would add hooks to the model once more.
        """
        resumed = resume_from_checkpoint
        self.checkpoints.resume_from(resumed)
        rows = batch_size or self.args.train_batch_size
        try:
            if not self.args.auto_find_batch_size:
                return super()._inner_training_loop(batch_size, args, resumed, *others, **kwargs)
            start = TrainingStart(self)
            while True:
                # also for what depends on it, such as the order of rows that are grouped by length
                self.args.per_device_train_batch_size = rows // max(self.args.n_gpu, 1)
                try:
                    return super()._inner_training_loop(rows, args, resumed, *others, **kwargs)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    if resumed is not None:
                        raise UserError(
                            f"{Path(resumed).name} was written by a run that takes {rows} rows at once, and now there "
                            f"is no memory for them: --force (make: FORCE=1) starts anew. {LESS}"
                        ) from error
                    if rows == 1:
                        raise UserError(f"not even a single row fits into memory. {LESS}") from error
                # here nothing holds the error any more, whose frames hold the tensors of the failed pass
                logger.warning(f"{rows} rows at once do not fit into memory: starting over with {rows // 2}")
                rows //= 2
                start.restore()
                if self.context is not None:
                    self.context.forget()
        finally:
            self.checkpoints.resuming = None

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Stop on a signal after a step's evaluation; the next public event comes when a batch more has been read."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.checkpoints.end_step()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint that is whole or absent; transformers fills its folder file by file, with pickles."""
        self.checkpoints.save()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights into sharded models too; transformers expects torch's own form of checkpoints there."""
        self.checkpoints.load_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Load the best weights, as `_load_from_checkpoint`."""
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self.checkpoints.load_weights(Path(cast(str, self.state.best_model_checkpoint)))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Group rows of one length for the whole step of all processes, in an order that a resumed run repeats.

        `get_train_dataloader` takes the sampler from here alone.
        """
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= self.args.world_size
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return EpochSampler(sampler, seed)
        return sampler
