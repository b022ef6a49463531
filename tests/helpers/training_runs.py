"""Small training runs: rows, a model and a trainer for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from camex_ft.config import TrainingConfig
from camex_ft.training.arguments import training_arguments
from camex_ft.training.trainer import CamexTrainer
from camex_ft.upcycling import upcycle
from tests.helpers.invariant_cases import MERGING, dense
from tests.helpers.tiny import EOS, PAD, VOCABULARY

TRAIN, VALIDATION = 16, 10
BATCH = 4
STEPS_AN_EPOCH = TRAIN // BATCH


class Stop(Exception):
    """What a killed process looks like from inside."""


class StopAfter(TrainerCallback):
    """Raises `Stop` when a step begins, as if the process were killed there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Stop


def rows(count: int, seed: int) -> Dataset:
    """Rows of 3 to 11 tokens, the last one the end token; labels 0 and 1."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, 11, count)
    ids = [[*draw.integers(3, VOCABULARY, n).tolist(), EOS] for n in lengths]
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "attention_mask": [[1] * len(row) for row in ids],
            "labels": draw.integers(0, 2, count).tolist(),
        }
    )


def pad(batch: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pad a batch to its longest row."""
    width = max(len(row["input_ids"]) for row in batch)
    blank = {"input_ids": PAD, "attention_mask": 0}
    made = {
        k: torch.tensor([row[k] + [b] * (width - len(row[k])) for row in batch]) for k, b in blank.items()
    }
    return made | {"labels": torch.tensor([row["labels"] for row in batch])}


def model(protocol: str = "ties-ca", model_type: str = "bert", **routing: Any) -> PreTrainedModel:
    """A model with experts, as a run makes it: the same at every call."""
    return upcycle(
        dense(model_type, "sequence-classification"),
        merging={**MERGING, "protocol": protocol},
        routing=routing,
        seed=1,
    )


def accuracy(validation: Dataset) -> Any:
    """A `score` that knows the validation rows."""

    def score(name: str, logits: np.ndarray) -> dict[str, float]:
        return {"accuracy": float((logits.argmax(-1) == np.asarray(validation["labels"][:])).mean())}

    return score


def trainer(
    folder: Path,
    given: PreTrainedModel | None = None,
    *,
    callbacks: Any = (),
    train_rows: int = TRAIN,
    **settings: Any,
) -> CamexTrainer:
    """A trainer whose settings are those of the section ``training``."""
    training = TrainingConfig.model_validate(
        {
            "num_train_epochs": 2.0,
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": BATCH,
            "learning_rate": 1e-2,
            "logging_steps": 2.0,
            "use_cpu": True,
            "disable_tqdm": True,
            **settings,
        }
    )
    validation = rows(VALIDATION, 2)
    torch.manual_seed(training.seed)
    return CamexTrainer(
        model=given if given is not None else model(),
        args=training_arguments(training, output=folder, best="eval_validation_accuracy"),
        train_dataset=rows(train_rows, 1),
        eval_dataset={"validation": validation},
        data_collator=pad,
        score=accuracy(validation),
        router_learning_rate=training.router_learning_rate,
        curvature_learning_rate=training.curvature_learning_rate,
        callbacks=list(callbacks),
    )


def weights(made: CamexTrainer) -> dict[str, Tensor]:
    """Everything that was trained, copied."""
    return {name: tensor.clone() for name, tensor in made.model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names of what is not equal bit for bit; an empty list is good."""
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
