"""Statistics of texts at each donor, for methods that weight by them: Fisher information and Gram matrices.

A donor is loaded, its texts go through it row by row (so that there is no padding), and the statistic is written to a
scratch folder before the next donor is loaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback
from transformers.pytorch_utils import Conv1D

from camex_ft import config
from camex_ft.compare.spec import overrides_of
from camex_ft.config import Config
from camex_ft.results import RunFolder
from camex_ft.run.steps import load_splits, make_trainer
from camex_ft.static.merge_inputs import MergeInputs
from camex_ft.static.merge_spec import MergeSpec
from camex_ft.static.methods import Method
from camex_ft.static.tensor_files import FolderReader, TensorInfo, write_tensors
from camex_ft.tasks.base import Prepared, Task
from camex_ft.training.trainer import CamexTrainer
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import TASKS

Inputs = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Statistics of the donors, by tensor name.

    Attributes:
        kind: "fisher" or "gram".
        donors: readers, in the order of the donors.
        transposed: names of matrices that are stored as [in, out].
    """

    kind: str
    donors: tuple[FolderReader, ...]
    transposed: frozenset[str] = frozenset()

    def arguments(self, name: str, rows: slice | None) -> dict[str, Any]:
        """Return what a method's function takes for some rows of a tensor."""
        if not all(name in donor.infos for donor in self.donors):
            return {"statistic": None, "transposed": False}
        of_rows = rows if self.kind == "fisher" else None
        statistic = torch.stack([donor.read(name, of_rows) for donor in self.donors])
        return {"statistic": statistic, "transposed": name in self.transposed}


def read_task(name: str, changes: Mapping[str, Any], head: str) -> tuple[Config, Task]:
    """Return the resolved configuration that a path, a shipped name or a run's folder means, and its task.

    Raises:
        UserError: it is at fault, or its task has another head than the merged model.
    """
    file = RunFolder(Path(name).expanduser()).config
    written = config.load_config(str(file) if file.is_file() else name, overrides_of(changes))
    settled, _ = config.resolve(written, needs=False)
    task: Task = TASKS.get(settled.task.id)
    if task.head != head:
        raise UserError(f"{name}: the task {task.id} has the head {task.head}, the merged model has {head}")
    return settled, task


def prepare_trainer(
    settled: Config,
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
) -> tuple[CamexTrainer, Prepared]:
    """Return the trainer of a configuration for a model, and its data; its files go to `folder`."""
    if tokenizer is None:
        raise UserError("the start has no tokenizer: rows of text need one")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    data = Prepared.make(task, load_splits(settled, task), tokenizer, task.within(model.config, settled.task))
    trainer = make_trainer(settled, data, model, tokenizer, RunFolder(folder))
    for progress in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(progress)
    return trainer, data


def gather(spec: MergeSpec, inputs: MergeInputs, entry: Method, folder: Path) -> Statistics:
    """Compute the statistic that a method takes at every donor, and write it to a folder.

    Raises:
        UserError: the rows are missing, or are not for the head of the models.
    """
    assert spec.data is not None and entry.statistic is not None
    texts, layout = spec.data, inputs.layout
    names = texts.config if isinstance(texts.config, list) else [texts.config or d for d in spec.donors]
    tasks = [read_task(_run(name), texts.set, layout.head) for name in names]
    compute: Callable[..., dict[str, Tensor]] = {"fisher": fisher_information, "gram": gram_matrices}[
        entry.statistic
    ]
    readers = []
    transposed: set[str] = set()
    for number, (settled, task) in enumerate(tasks):
        model = inputs.donor_model(number)
        transposed |= {
            f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)
        }
        one = settled.model_copy(
            update={"training": settled.training.model_copy(update={"per_device_eval_batch_size": 1})}
        )
        with tempfile.TemporaryDirectory() as scratch:
            trainer, data = prepare_trainer(one, task, model, layout.tokenizer, Path(scratch))
            train = data.train
            if train is None:
                raise UserError(f"{names[number]}: there is no train split, whose rows are needed")
            loader = trainer.get_eval_dataloader(train)
            device = next(model.parameters()).device
            batches = ({k: v.to(device) for k, v in batch.items()} for batch in islice(loader, texts.rows))
            statistic = compute(model, batches)
        statistic = {name: tensor for name, tensor in statistic.items() if name in layout.infos}
        place = folder / str(number)
        place.mkdir(parents=True)
        infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in statistic.items()}
        write_tensors(place, infos, lambda name, tensors=statistic: [tensors[name]])  # type: ignore[misc]
        readers.append(FolderReader(place))
    return Statistics(kind=entry.statistic, donors=tuple(readers), transposed=frozenset(transposed))


def _run(name: str) -> str:
    """Return `name`, unless it is a donor that is no run."""
    if Path(name).expanduser().is_dir() and not RunFolder(Path(name).expanduser()).config.is_file():
        raise UserError(
            f"data: {name} is no run of camex_ft: expected data.config, whose train rows are read"
        )
    return name


def fisher_information(model: PreTrainedModel, batches: Iterator[Inputs]) -> dict[str, Tensor]:
    """Return the mean over batches of the squared gradient of the loss, by parameter; each in float32 as it is shaped.

    Args:
        model: in evaluation mode; its gradients are removed.
        batches: of one row each, with labels.
    """
    model.eval()
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    count = 0
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad.square()
        count += 1
    model.zero_grad()
    if not count:
        raise UserError("data: the train split has no rows")
    return {name: (total / count).cpu() for name, total in sums.items()}


@torch.no_grad()
def gram_matrices(model: PreTrainedModel, batches: Iterator[Inputs]) -> dict[str, Tensor]:
    """Return E[x x^T] over the tokens that enter each linear map, by the name of its matrix; [in, in], float32.

    Args:
        model: in evaluation mode.
        batches: of one row each, without padding.
    """
    model.eval()
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            tokens = arguments[0].flatten(0, -2).double()
            gram = (tokens.T @ tokens).cpu()
            sums[name] = sums[name] + gram if name in sums else gram
            counts[name] = counts.get(name, 0) + len(tokens)

        return add

    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    handles = [module.register_forward_pre_hook(hook(f"{name}.weight")) for name, module in linear]
    try:
        for batch in batches:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise UserError("data: the train split has no rows")
    return {name: (total / counts[name]).float() for name, total in sums.items()}
