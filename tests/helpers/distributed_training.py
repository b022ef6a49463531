"""One training run of any number of processes: what `worker.py` does in each of several, and a test in its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from camex_ft.training.trainer import CamexTrainer
from tests.helpers import training_runs
from tests.helpers.training_runs import BATCH, model

GLOBAL, ROWS = 12, 48  # rows of a step over all processes, which 1, 2 and 3 share evenly; rows of an epoch
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
ZERO = {  # DeepSpeed's CPU accelerator; accelerate offers it for GPUs
    "DS_ACCELERATOR": "cpu",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
}
ENGINES: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp": FSDP,
    "zero2": {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


def deepspeed_file(engine: str, folder: Path) -> Path:
    """Write DeepSpeed's settings: parameters of few elements stay whole by default, and here all are few."""
    auto = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    zero = {
        "stage": int(engine.removeprefix("zero")),
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    file = folder / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": zero, **dict.fromkeys(auto, "auto")}))
    return file


def still(made: PreTrainedModel) -> PreTrainedModel:
    """The same model without dropout."""
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return made


def make(folder: Path, protocol: str, *, double: bool = False, **settings: Any) -> CamexTrainer:
    """A trainer whose steps take GLOBAL rows, whatever the number of processes."""
    given = still(model(protocol, noise=False))
    return training_runs.trainer(
        folder,
        given.double() if double else given,
        train_rows=ROWS,
        **{
            "per_device_train_batch_size": GLOBAL // int(os.environ.get("WORLD_SIZE", 1)),
            "per_device_eval_batch_size": BATCH,
            "logging_steps": 1.0,
            "num_train_epochs": 5.0,
            "save_strategy": "no",
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            **settings,
        },
    )


def outcome(made: CamexTrainer) -> dict[str, Any]:
    """What must not depend on the number of processes: losses, routing, metrics, weights. All processes take part."""
    made.args.dataloader_drop_last = True  # which is about training, and that is over
    metrics = made.evaluate("validation", metric_key_prefix="final")
    metrics |= {"rows_a_step": made.rows_a_step() or 0, "scored": len(made.outcome)}
    state = made.full_state() or made.model.state_dict()
    lines = [
        {k: v for k, v in line.items() if k != "epoch"} for line in made.state.log_history if "loss" in line
    ]
    names = [n for n, _ in made.accelerator.unwrap_model(made.model).named_parameters()]
    return {
        "lines": json.dumps(lines),
        "loads": json.dumps(made.monitor.loads),
        "metrics": json.dumps(
            {k: v for k, v in metrics.items() if "per_second" not in k and "runtime" not in k}
        ),
        "routing": {name: torch.as_tensor(s) for name, s in made.routing.items()},
        "weights": {n: state[n].clone() for n in names if n in state},
    }


def keep(made: CamexTrainer, file: Path) -> None:
    """Write the outcome, once."""
    found = outcome(made)
    if made.is_world_process_zero():
        torch.save(found, file)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest difference of two sets of tensors with the same names."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
