"""``camex-ft plan --measure``: the peak memory and the time of real training steps, in a process of their own.

The model is built from the backbone's configuration alone, by the code that a run uses, and its rows are made up and as
long as they can be; the Trainer is that of a run.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, default_data_collator

from camex_ft.backbones.base import plain_type
from camex_ft.bench import memory
from camex_ft.bench.child import in_child
from camex_ft.config import Config
from camex_ft.estimate import materials
from camex_ft.estimate.survey import Batch
from camex_ft.training.arguments import training_arguments
from camex_ft.training.cost import Parameters, count_parameters
from camex_ft.training.trainer import CamexTrainer

STEPS = 3  # the second finds what the first has left: the optimizer's state, and freed memory
QUIET = {
    "num_train_epochs": 1.0,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "train_sampling_strategy": "sequential",
    "disable_tqdm": True,
    "logging_strategy": "no",
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Time and memory of training steps.

    Attributes:
        parameters: of the model.
        peak: the most memory held in the steps, in bytes; of the process, or on a GPU what torch allocated.
        framework: what the process held before there was a model, in bytes; 0 on a GPU.
        seconds: the shortest of the optimizer steps, which is the one that others disturbed least.
        steps: how many there were.
    """

    parameters: Parameters
    peak: int
    framework: int
    seconds: float
    steps: int


def measure(settled: Config, *, steps: int = STEPS) -> Measured:
    """Return what `steps` optimizer steps of a configuration take, in a fresh process.

    Args:
        settled: the resolved configuration.
        steps: at least 2.

    Raises:
        UserError: there is not enough memory, or the configuration is at fault.
    """
    return in_child(_measure, settled, steps)


def _measure(settled: Config, steps: int) -> Measured:
    memory.reset_peak()
    framework = memory.resident()
    model, batch = materials(settled)
    extra = {**QUIET, "max_steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            settled.training.model_copy(update=extra), output=Path(folder), best=None
        )
        rows = [made_up(model, batch, seed=i) for i in range(steps * batch.steps * batch.rows)]
        clock = Clock()
        trainer = CamexTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=default_data_collator,
            callbacks=[clock],
            router_learning_rate=settled.training.router_learning_rate,
            curvature_learning_rate=settled.training.curvature_learning_rate,
        )
        memory.reset_peak()
        on_gpu = trainer.args.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    return Measured(
        parameters=count_parameters(model),
        peak=torch.cuda.max_memory_allocated() if on_gpu else memory.peak_resident(),
        framework=0 if on_gpu else framework,
        seconds=clock.shortest,
        steps=steps,
    )


class Clock(TrainerCallback):
    """Times optimizer steps."""

    def __init__(self) -> None:
        self.started, self.shortest = 0.0, float("inf")

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop, once the device is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.shortest = min(self.shortest, time.perf_counter() - self.started)


def made_up(model: PreTrainedModel, batch: Batch, *, seed: int) -> dict[str, Tensor]:
    """Return a row of random tokens at its full length, and labels of the kind that the head takes."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.vocab_size, (batch.length,), generator=generator)
    row = {"attention_mask": torch.ones_like(ids)}
    if plain_type(config.model_type) == "t5":
        ids[ids == config.eos_token_id] = 2  # its classifier reads the one end token
        ids[-1] = config.eos_token_id
    if model.get_output_embeddings() is None:
        regression = config.num_labels == 1
        row["labels"] = torch.tensor(0.5) if regression else torch.tensor(seed % config.num_labels)
    else:
        row["labels"] = ids[: batch.target] if batch.target else ids
    return {"input_ids": ids, **row}
