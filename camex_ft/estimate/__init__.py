"""`camex-ft plan`: parameters, multiply-adds, memory and time of any configuration, side by side, without its weights.

    config --resolve, skeleton--> dense model on the meta device --upcycle, once a column--> counts

Exact are the parameters, those of the model that a run builds, and with them weights, gradients and the state of AdamW.
Multiply-adds are counted by the formulas in `operations`; `memory` follows a step to its peak; `columns` brings them
together for a protocol; `advice` tries other settings; `measured` takes real steps. Data are not read: every row counts
with its full length, without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from camex_ft import config as configuration
from camex_ft.backbones.source import trains_tokenizer
from camex_ft.config import Config
from camex_ft.estimate.advice import Advice, advise
from camex_ft.estimate.columns import (
    OPTIMIZER,
    SHIPPED,
    Column,
    Setting,
    batch_of,
    chains_of,
    column,
    dense_of,
    materials,
    of_a_device,
    precision_of,
    protocols_of,
    under,
)
from camex_ft.estimate.memory import Where, gpu_here
from camex_ft.estimate.operations import TFLOPS, measured_tflops
from camex_ft.estimate.survey import Batch, survey
from camex_ft.tasks.base import Task
from camex_ft.utils.registry import TASKS

__all__ = ["Column", "CostEstimate", "Setting", "Where", "chains_of", "materials", "plan"]

EXACT = ("weights", "gradients", "optimizer", "vectors")
ESTIMATED = ("activations", "working", "heap", "total")


@dataclass(frozen=True, kw_only=True)
class CostEstimate:
    """Cost estimate of a configuration.

    Attributes:
        backbone, task: of the configuration.
        batch: rows and tokens of one training step.
        setting: precision, device and processes of it.
        columns: one a protocol.
        notes: on the columns, for the reader.
        advice: settings with which a step of the own protocol would fit, if there is a limit.
    """

    backbone: str
    task: str
    batch: Batch
    setting: Setting
    columns: tuple[Column, ...]
    notes: tuple[str, ...]
    advice: Advice | None = None

    @property
    def own(self) -> Column | None:
        """The configuration's own column, where it is among them."""
        return next((column for column in self.columns if column.own), None)

    def as_json(self) -> dict[str, Any]:
        """Return everything as numbers, strings, lists and dictionaries."""
        numbers = asdict(self)
        for own, entry in zip(self.columns, numbers["columns"], strict=True):
            entry["operations"]["total"] = own.operations.total
            entry["duration"]["total"] = own.duration.total
        numbers["exact"] = ["parameters", *(f"memory.{part}" for part in EXACT)]
        numbers["estimated"] = [*(f"memory.{part}" for part in ESTIMATED), "duration"]
        return numbers


def plan(
    written: Config,
    *,
    gpu: bool | None = None,
    protocols: Sequence[str] | None = None,
    where: Where | None = None,
    tflops: float | None = None,
    limit: int | None = None,
) -> CostEstimate:
    """Estimate the cost of a configuration, with its own protocol and with dense, mixture, static and dynamic ones.

    Args:
        written: the configuration; neither its data nor the weights of its backbone are needed.
        gpu: estimate for a GPU's kernels; None: for this machine.
        protocols: of the columns, in place of the above.
        where: processes and the memory of their framework; None: one process, without its framework.
        tflops: 10^12 operations a second that a device sustains; None: measured on a CPU, `TFLOPS` for a GPU.
        limit: bytes of a device, for advice; None: no advice.

    Raises:
        UserError: the backbone's configuration is at fault or out of reach, or the configuration contradicts itself.
    """
    settled, reason = configuration.resolve(written, needs=False)
    settled = of_a_device(settled, (where or Where()).engine.processes)
    task: Task = TASKS.get(settled.task.id)
    dense = dense_of(settled, task)
    precision = precision_of(settled, gpu=gpu_here() if gpu is None else gpu)
    measured = tflops is None and not precision.gpu
    rate = tflops or (measured_tflops(half=precision.half) if measured else TFLOPS)
    setting = Setting(precision=precision, where=where or Where(), tflops=rate, measured=measured)

    def cost(settled: Config, setting: Setting, *, own: bool = True) -> Column:
        return column(settled, dense, survey(dense, batch_of(settled, task, dense)), setting, own=own)

    def peak(settled: Config, where: Where) -> int:
        again = precision_of(settled, gpu=precision.gpu)
        return cost(settled, replace(setting, precision=again, where=where)).memory.total

    names = protocols or protocols_of(settled)
    return CostEstimate(
        backbone=settled.backbone,
        task=settled.task.id,
        batch=batch_of(settled, task, dense),
        setting=setting,
        columns=tuple(cost(under(settled, n), setting, own=n == settled.merging.protocol) for n in names),
        notes=(reason, *_notes(settled, task, dense)),
        advice=None if limit is None else advise(settled, setting.where, limit, peak, gpu=precision.gpu),
    )


def _notes(settled: Config, task: Task, dense: PreTrainedModel) -> Iterator[str]:
    if dense.config.name_or_path == SHIPPED:
        yield f"{settled.backbone} is out of reach: its shape is the one that comes with the package"
    if trains_tokenizer(settled, plain_text=task.plain_text):
        yield "the tokenizer would be trained on the data, which are not read: its vocabulary counts as full"
    optimizer = str((settled.training.model_extra or {}).get("optim") or OPTIMIZER)
    if not optimizer.startswith(("adamw_torch", "sgd", "adagrad", "rmsprop")):
        yield f"training.optim {optimizer} counts as AdamW with two float32 moments"
    if settled.merging.top_k is None:
        yield "merging.top_k is not set: a token of smoe meets all experts"
