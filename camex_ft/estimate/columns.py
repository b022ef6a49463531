"""One column of a cost estimate: one protocol on a configuration's backbone.

The parameters are those of the model that a run builds, made by the same code on torch's meta device. The time of a
step is

    seconds = 2 * multiply-adds * passes / rate  +  bytes sent / bandwidth
    passes  = 2 + trained share of the parameters, + 1 under gradient checkpointing

since a product is computed forward, for the gradient of its input and, where it is trained, of its matrix. Bytes are
sent after computing, not meanwhile. Public facts about backbones and data sets (`facts.yaml`) serve without a network.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import PreTrainedModel

from camex_ft import upcycling
from camex_ft.backbones.loading import skeleton
from camex_ft.backbones.source import OutOfReach, trains_tokenizer
from camex_ft.config import Config
from camex_ft.config.backbones import NEW
from camex_ft.config.rules import broken
from camex_ft.estimate.memory import Memory, Stored, Where, memory
from camex_ft.estimate.operations import TFLOPS, Operations, operations
from camex_ft.estimate.survey import Batch, Precision, Survey
from camex_ft.moe.layers.ffn import ExpertFFN, MergedFFN
from camex_ft.moe.layers.propagation import propagation_paths
from camex_ft.protocols import Protocol
from camex_ft.tasks.base import Task
from camex_ft.training.cost import Parameters, count_parameters
from camex_ft.utils.registry import PROTOCOLS, TASKS

OPTIMIZER = "adamw_torch_fused"  # the default of transformers.TrainingArguments
DENSE, MIXTURE, STATIC, DYNAMIC = "dense", "smoe", "domain-ca", "ep-camex"
SHIPPED = "shipped"
LORA = "lora"
BANDWIDTH = 10e9  # bytes a second between processes, assumed


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Seconds of an optimizer step: computing products of matrices, and sending gradients and weights."""

    computing: float
    sending: float

    @property
    def total(self) -> float:
        """Both, one after the other."""
        return self.computing + self.sending


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Precision, device and processes of a step, and 10^12 operations a second, measured here or assumed."""

    precision: Precision
    where: Where = field(default_factory=Where)
    tflops: float = TFLOPS
    measured: bool = False


@dataclass(frozen=True, kw_only=True)
class Column:
    """Estimates of one protocol on the configuration's backbone; `own`: it is the configuration's own protocol."""

    protocol: str
    own: bool
    parameters: Parameters
    operations: Operations
    memory: Memory
    duration: Duration
    chains: tuple[str, ...] = ()


def column(
    settled: Config, dense: PreTrainedModel, dense_survey: Survey, setting: Setting, *, own: bool = True
) -> Column:
    """Return the column of a configuration.

    Args:
        settled: the resolved configuration.
        dense: its backbone, on the meta device.
        dense_survey: of the backbone.
        setting: of a step.
        own: it is the configuration that was asked for.
    """
    with torch.device("meta"):
        model = upcycling.for_run(settled, dense)
    layers = upcycling.expert_layers(model)
    cost = operations(dense_survey, layers)
    return Column(
        protocol=settled.merging.protocol,
        own=own,
        parameters=count_parameters(model),
        operations=cost,
        memory=memory(model, dense_survey, layers, setting.precision, setting.where),
        duration=duration(model, cost, dense_survey.batch, setting),
        chains=chains_of(layers),
    )


def duration(model: nn.Module, cost: Operations, batch: Batch, setting: Setting) -> Duration:
    """Return the time of an optimizer step on each process, by the formula above.

    Args:
        model: with experts or dense, on any device.
        cost: of a forward pass.
        batch, setting: of the step.
    """
    stored, engine = Stored.of(model), setting.where.engine
    weights, gradients = sum(stored.weights.values()), sum(stored.gradients.values())
    passes = 2 + gradients / weights + setting.precision.checkpointing
    sent = 2 * weights + gradients if engine.shares_weights else 2 * gradients
    return Duration(
        computing=2 * cost.total * batch.tokens * batch.steps * passes / (setting.tflops * 1e12),
        sending=sent * (engine.processes - 1) / engine.processes / BANDWIDTH,
    )


def materials(settled: Config) -> tuple[PreTrainedModel, Batch]:
    """Return the model of a configuration with random weights, and the batch of a step."""
    task: Task = TASKS.get(settled.task.id)
    meta = dense_of(settled, task)
    dense = type(meta)._from_config(meta.config, dtype=torch.float32).train()
    return upcycling.for_run(settled, dense), batch_of(settled, task, meta)


def dense_of(settled: Config, task: Task) -> PreTrainedModel:
    """Return the backbone of a configuration, on the meta device.

    Where the hub is out of reach, the shape in `facts.yaml` is used; its config has the name `SHIPPED` then.

    Raises:
        UserError: its configuration is at fault or out of reach.
    """
    trained = trains_tokenizer(settled, plain_text=task.plain_text)

    def make(spec: str) -> PreTrainedModel:
        return skeleton(spec, head=task.head, trained_tokenizer=trained, **task.backbone_options())

    try:
        dense = make(settled.backbone)
    except OutOfReach:
        known = known_backbone(settled.backbone)
        if known is None:
            raise
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(known), encoding="utf-8")
            dense = make(folder)
        dense.config.name_or_path = SHIPPED
    task.check_backbone(dense.config, settled.task)
    return dense


def protocols_of(settled: Config) -> tuple[str, ...]:
    """Return the protocols of the columns: dense, mixture, static and dynamic merging, and the configuration's own."""
    own = settled.merging.protocol
    protocol: Protocol = PROTOCOLS.get(own)
    # weights are merged onto a base expert that every layer stores, from parameters alone
    is_static = protocol.form == "weights" and protocol.base and not protocol.statistic
    static = own if is_static else STATIC
    wanted = [DENSE, MIXTURE, static, *([DYNAMIC] if DYNAMIC in PROTOCOLS.names() else []), own]
    return tuple(dict.fromkeys(wanted))


def of_a_device(settled: Config, processes: int) -> Config:
    """Return the configuration with the rows of each device in place of those of the whole step."""
    rows = settled.training.rows_a_device(processes)
    training = {"per_device_train_batch_size": rows, "global_batch_size": None}
    return settled.model_copy(update={"training": settled.training.model_copy(update=training)})


def batch_of(settled: Config, task: Task, model: PreTrainedModel) -> Batch:
    """Return the batch of one training step of a task; all rows at their full length."""
    extra = settled.training.model_extra or {}
    return Batch(
        rows=settled.training.per_device_train_batch_size,
        length=settled.task.length,
        target=settled.task.target_length if model.config.is_encoder_decoder else 0,
        steps=int(extra.get("gradient_accumulation_steps") or 1),
    )


def precision_of(settled: Config, *, gpu: bool) -> Precision:
    """Return how the training section asks for a step to be run."""
    extra = settled.training.model_extra or {}
    return Precision(
        half=bool(extra.get("bf16") or extra.get("fp16")),
        gpu=gpu,
        checkpointing=bool(extra.get("activation_checkpointing") or extra.get("gradient_checkpointing")),
        optimizer=str(extra.get("optim") or OPTIMIZER),
    )


def under(settled: Config, name: str) -> Config:
    """Return the configuration under another protocol, without the settings that only its own protocol allows."""
    if name == settled.merging.protocol:
        return settled
    protocol: Protocol = PROTOCOLS.get(name)
    routing, tuning = settled.routing, settled.tuning
    if routing.granularity not in ("auto", *protocol.granularities):
        routing = routing.model_copy(update={"granularity": "auto"})
    if getattr(routing, "router", "linear") == "expert-choice" and protocol.form != "outputs":
        routing = routing.model_copy(update={"router": "linear"})
    if protocol.form == "dense":
        tuning = tuning if tuning.mode == "lora" else tuning.model_copy(update={"mode": "full"})
    merging = settled.merging.model_copy(update={"protocol": name, "options": {}})
    changed = settled.model_copy(update={"merging": merging, "routing": routing, "tuning": tuning})
    if changed.upcycle.rank is not None and list(broken(changed)):
        changed = changed.model_copy(update={"upcycle": changed.upcycle.model_copy(update={"rank": None})})
    if tuning.mode == LORA and list(broken(changed)):  # it has no experts of low rank
        return changed.model_copy(update={"tuning": tuning.model_copy(update={"mode": "experts"})})
    return changed


def chains_of(layers: dict[str, ExpertFFN]) -> tuple[str, ...]:
    """Return a line for each chain of dynamic merging: the layer that stores its base expert, and its length."""
    lines, stacks = [], set()
    for chain in propagation_paths([layer for layer in layers.values() if isinstance(layer, MergedFFN)]):
        stack = layers[chain[0]].stack
        why = ", a new one: its matrices have other shapes than those before" if stack in stacks else ""
        length = f"{len(chain)} layers" if len(chain) > 1 else "1 layer, which has none to propagate to,"
        lines.append(f"{stack}: {length} from {chain[0]} on{why}")
        stacks.add(stack)
    return tuple(lines)


# -- public facts -----------------------------------------------------------------------------------------------------


def known_rows(task: str) -> Mapping[str, int] | None:
    """Return the rows that the model reads in each split of a task's public data set; None where it is not known."""
    examples = _facts()["rows"].get(task)
    rows_of_an_example = _facts()["rows_of_an_example"].get(task, 1)
    if examples is None or rows_of_an_example is None:
        return None
    return {split: count * rows_of_an_example for split, count in examples.items()}


def known_tokens(task: str) -> Mapping[str, int] | None:
    """Return the tokens of each split under GPT-2's tokenizer; None where they are not known."""
    counts: Mapping[str, int] | None = _facts()["tokens"].get(task)
    return counts


def known_backbone(spec: str) -> dict[str, Any] | None:
    """Return the shape of a backbone of the hub, the entries of its config.json; None where it is not known."""
    entry = _facts()["backbones"].get(spec.removeprefix(NEW))
    return None if entry is None else dict(entry["config"])


@lru_cache
def _facts() -> dict[str, Any]:
    text = resources.files("camex_ft.estimate").joinpath("facts.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded
