"""`camex-ft plan`: parameters, multiply-adds and memory of any configuration, side by side, without its weights.

    config --resolve, skeleton--> dense model on the meta device --upcycle, once a column--> counts

Exact are the parameters (those of a run's own model, made by the same code) and what follows from them: weights,
gradients, the state of AdamW. Multiply-adds are counted by the formulas in `operations`. Activations are an estimate
(`memory`). Data are not read: every row is taken to have its full length, and no padding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from camex_ft import config as configuration
from camex_ft import upcycling
from camex_ft.backbones.skeleton import skeleton
from camex_ft.config import Config
from camex_ft.config.backbones import EMBEDDED
from camex_ft.moe.ffn import ExpertFFN, MergedFFN
from camex_ft.moe.link import chains
from camex_ft.planning.memory import Memory, Precision, gpu_here, memory
from camex_ft.planning.operations import Operations, operations
from camex_ft.planning.survey import Batch, Survey, survey
from camex_ft.protocols import Protocol
from camex_ft.registry import PROTOCOLS, TASKS
from camex_ft.tasks.base import Task
from camex_ft.training.cost import Parameters, count_parameters

DENSE, MIXTURE, STATIC, DYNAMIC = "dense", "smoe", "domain-ca", "ep-camex"
LM, TEXT_TO_TEXT = "causal-lm", "seq2seq-lm"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One protocol on the configuration's backbone.

    Attributes:
        protocol: its name.
        own: it is the configuration's own.
        parameters, operations, memory: what it costs.
        chains: of dynamic merging, a line each: which layers share a base expert.
    """

    protocol: str
    own: bool
    parameters: Parameters
    operations: Operations
    memory: Memory
    chains: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a configuration costs.

    Attributes:
        backbone, task: of the configuration.
        batch: what one training step reads.
        precision: how it is run.
        columns: one a protocol.
        notes: what the reader must know of them.
    """

    backbone: str
    task: str
    batch: Batch
    precision: Precision
    columns: tuple[Column, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return everything as numbers, strings, lists and dictionaries."""
        made = asdict(self)
        for column, entry in zip(self.columns, made["columns"], strict=True):
            entry["operations"]["total"] = column.operations.total
            entry["memory"]["total"] = column.memory.total
        made["exact"] = [
            "parameters",
            "memory.weights",
            "memory.gradients",
            "memory.optimizer",
            "memory.vectors",
        ]
        made["estimated"] = ["memory.activations", "memory.total"]
        return made


def plan(given: Config, *, gpu: bool | None = None, protocols: Sequence[str] | None = None) -> Plan:
    """Return what a configuration costs, under its own protocol and beside it dense, mixture, static and dynamic.

    Args:
        given: the configuration; neither its data nor the backbone's weights need to be there.
        gpu: estimate for a GPU's kernels; None: as on this machine.
        protocols: the columns, in place of those.

    Raises:
        UserError: the backbone's configuration is at fault or out of reach, or the configuration contradicts itself.
    """
    settled, reason = configuration.resolve(given, needs=False)
    task: Task = TASKS.get(settled.task.id)
    trained = task.plain_text and settled.data.source != "embedded" and settled.backbone.startswith(EMBEDDED)
    dense = skeleton(settled.backbone, head=task.head, trained_tokenizer=trained, **task.backbone_options())
    task.check_backbone(dense.config, settled.task)
    batch = batch_of(settled, task, dense)
    precision = precision_of(settled, gpu=gpu_here() if gpu is None else gpu)
    found = survey(dense, batch)
    columns = tuple(
        _column(name, settled, dense, found, precision) for name in protocols or protocols_of(settled)
    )
    notes = (reason, *_notes(settled, trained=trained))
    return Plan(
        backbone=settled.backbone,
        task=settled.task.id,
        batch=batch,
        precision=precision,
        columns=columns,
        notes=notes,
    )


def protocols_of(settled: Config) -> tuple[str, ...]:
    """Return the columns' protocols: dense, mixture, static and dynamic merging, and the configuration's own."""
    own = settled.merging.protocol
    static = own if _is_static(PROTOCOLS.get(own)) else STATIC
    wanted = [DENSE, MIXTURE, static, *([DYNAMIC] if DYNAMIC in PROTOCOLS.names() else []), own]
    return tuple(dict.fromkeys(wanted))


def batch_of(settled: Config, task: Task, model: PreTrainedModel) -> Batch:
    """Return what one training step of a task reads at a time; all rows at their longest."""
    length = settled.task.block_size if task.head == LM else settled.task.max_length
    target = settled.task.answer_length if task.head == TEXT_TO_TEXT else length
    extra = settled.training.model_extra or {}
    return Batch(
        rows=settled.training.per_device_train_batch_size,
        length=length,
        target=target if model.config.is_encoder_decoder else 0,
        steps=int(extra.get("gradient_accumulation_steps") or 1),
    )


def precision_of(settled: Config, *, gpu: bool) -> Precision:
    """Return how the training section asks for a step to be run."""
    extra = settled.training.model_extra or {}
    return Precision(
        half=bool(extra.get("bf16") or extra.get("fp16")),
        gpu=gpu,
        checkpointing=bool(extra.get("activation_checkpointing") or extra.get("gradient_checkpointing")),
        optimizer=str(extra.get("optim") or "adamw_torch"),
    )


def under(settled: Config, name: str) -> Config:
    """Return the configuration under another protocol, less what only its own one allows."""
    if name == settled.merging.protocol:
        return settled
    protocol: Protocol = PROTOCOLS.get(name)
    routing, tuning = settled.routing, settled.tuning
    if routing.granularity not in ("auto", *protocol.granularities):
        routing = routing.model_copy(update={"granularity": "auto"})
    if getattr(routing, "router", "linear") == "expert-choice" and protocol.form != "outputs":
        routing = routing.model_copy(update={"router": "linear"})
    if protocol.form == "dense":
        tuning = tuning.model_copy(update={"mode": "full"})
    merging = settled.merging.model_copy(update={"protocol": name, "options": {}})
    return settled.model_copy(update={"merging": merging, "routing": routing, "tuning": tuning})


def chains_of(layers: dict[str, ExpertFFN]) -> tuple[str, ...]:
    """Return a line for each chain of dynamic merging: where its base expert is stored, and how far it is carried."""
    made, stacks = [], set()
    for chain in chains([layer for layer in layers.values() if isinstance(layer, MergedFFN)]):
        stack = layers[chain[0]].stack
        why = ", a new one: its matrices have other shapes than those before" if stack in stacks else ""
        length = f"{len(chain)} layers" if len(chain) > 1 else "1 layer, which has nothing to carry to,"
        made.append(f"{stack}: {length} from {chain[0]} on{why}")
        stacks.add(stack)
    return tuple(made)


def _column(
    name: str, settled: Config, dense: PreTrainedModel, found: Survey, precision: Precision
) -> Column:
    chosen = under(settled, name)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a function that upcycling changes: nothing is computed here
        model = upcycling.upcycle(
            dense, merging=chosen.merging, routing=chosen.routing, upcycle=chosen.upcycle
        )
    upcycling.freeze(model, chosen.tuning.mode)
    layers = upcycling.expert_layers(model)
    return Column(
        protocol=name,
        own=name == settled.merging.protocol,
        parameters=count_parameters(model),
        operations=operations(found, layers),
        memory=memory(model, found, layers, precision),
        chains=chains_of(layers),
    )


def _is_static(protocol: Protocol) -> bool:
    """Whether weights are merged onto a base expert that every layer stores, from parameters alone."""
    return protocol.form == "weights" and protocol.base and not protocol.statistic


def _notes(settled: Config, *, trained: bool) -> Iterator[str]:
    if trained:
        yield "the tokenizer would be trained on the data, which are not read: its vocabulary counts as full"
    optimizer = str((settled.training.model_extra or {}).get("optim") or "adamw_torch")
    if not optimizer.startswith(("adamw_torch", "sgd", "adagrad", "rmsprop")):
        yield f"training.optim {optimizer} counts as AdamW with two float32 moments"
    if settled.merging.top_k is None:
        yield "merging.top_k is not set: a token of smoe meets all experts"
    if settled.tuning.mode != "full":
        yield "activations are those of full tuning; frozen parts save less"
