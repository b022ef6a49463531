"""The steps of a run: its data, its model, its trainer, its name. `pipeline` takes them in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from camex_ft import config, upcycling
from camex_ft.backbones.content import Content
from camex_ft.backbones.loading import load as load_backbone
from camex_ft.backbones.source import trains_tokenizer
from camex_ft.config import Config
from camex_ft.config.identity import hash_by_name
from camex_ft.config.needs import local_backbone
from camex_ft.data import sources
from camex_ft.results import RunFolder, run_name
from camex_ft.results.run_folder import find_folder, may_be_of
from camex_ft.tasks.base import Prepared, Task
from camex_ft.tasks.lm import stream_line
from camex_ft.training.arguments import training_arguments
from camex_ft.training.callbacks.reporting import HistoryCallback, trackers
from camex_ft.training.checkpoint_folder import identity
from camex_ft.training.trainer import CamexTrainer


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """Inputs of one run.

    Attributes:
        started: time of its start, in seconds since 1970.
        settled: the resolved configuration.
        reason: its profile and the reason for it, from `config.resolve`.
        task: its task.
        splits: its examples, by split.
        data_sha256: fingerprint of these.
        backbone: path and SHA-256 of the backbone; None for an embedded one.
        folder: of the run.
        force: run again from nothing.
    """

    started: float
    settled: Config
    reason: str
    task: Task
    splits: Mapping[str, datasets.Dataset]
    data_sha256: str
    backbone: Content
    folder: RunFolder
    force: bool = False

    @property
    def resume(self) -> str:
        """Value of `training.resume`, "never" under `force`."""
        return "never" if self.force else self.settled.training.resume


def quieten() -> None:
    """Turn off the progress bars of transformers and datasets; training shows its own."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def load_splits(settled: Config, task: Task) -> dict[str, datasets.Dataset]:
    """Return the examples of the run, by split."""
    source = settled.data
    return sources.load(
        task,
        source=source.source,
        dir=source.path,
        seed=source.seed,
        train_rows=source.train_rows,
        eval_rows=source.eval_rows,
        serves=source.splits,
        domain=source.domain,
    )


def load_model(
    settled: Config,
    task: Task,
    splits: Mapping[str, datasets.Dataset] | None = None,
    path: Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the upcycled backbone under the task's head, with its tokenizer.

    Args:
        settled: the resolved configuration.
        task: its task.
        splits: the examples, to train the tokenizer of an embedded backbone on (`trains_tokenizer`).
        path: of the backbone's files; None: they are located here.
    """
    texts = None
    if splits is not None and trains_tokenizer(settled, plain_text=task.plain_text):
        texts = map(stream_line, splits[task.splits["train"]]["text"][:])
    dense, tokenizer = load_backbone(
        settled.backbone,
        head=task.head,
        seed=settled.training.seed,
        texts=texts,
        path=path,
        **task.backbone_options(),
    )
    return upcycling.for_run(settled, dense, tokenizer=tokenizer, in_place=True), tokenizer


def trained_tokenizer(settled: Config, task: Task, tokenizer: Any) -> str | None:
    """Return the description of a tokenizer that was trained on the text (`trains_tokenizer`), else None."""
    if not trains_tokenizer(settled, plain_text=task.plain_text):
        return None
    return f"a byte-level BPE of {len(tokenizer):,} tokens, trained on the train split"


def make_trainer(
    settled: Config,
    data: Prepared,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: RunFolder,
    *,
    tracked: bool = False,
) -> CamexTrainer:
    """Return the trainer of a run, which writes its history into `folder`.

    Args:
        settled: the resolved configuration.
        data, model, tokenizer: of the run.
        folder: of the run.
        tracked: log to the trackers of `training.report_to`; needs `logging_to` around it.
    """
    split, primary = data.primary
    labelled = data.labelled(split)
    task = data.task.owner(split)
    arguments = training_arguments(
        settled.training,
        output=folder.checkpoints,
        best=f"eval_{split}_{primary}" if labelled else None,
        greater_is_better=data.greater_is_better,
    )
    named, arguments.report_to = cast("list[str]", arguments.report_to), []
    trainer = CamexTrainer(
        model=model,
        args=arguments,
        callbacks=trackers(named, folder.logs) if tracked else None,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=task.collator(tokenizer),
        processing_class=tokenizer,
        outputs=partial(task.outputs, tokenizer=tokenizer, settings=settled.task),
        score=data.score,
        router_learning_rate=settled.training.router_learning_rate,
        curvature_learning_rate=settled.training.curvature_learning_rate,
    )
    trainer.checkpoints.before_rename = folder.sync_history
    trainer.add_callback(
        HistoryCallback(folder.append_history, lambda: trainer.monitor.loads, folder.rewind_history)
    )
    return trainer


def name_of(settled: Config, data: str, backbone: str | None, *, anew: bool = False) -> str:
    """Return the name of a run's folder, an existing one if there is one.

    A run that starts from another run's checkpoint gets its own folder.

    Args:
        settled: the resolved configuration.
        data, backbone: SHA-256 of the data, and of the backbone's content (None: embedded).
        anew: start from nothing, regardless of `training.resume`.
    """
    name = _name(settled, data, backbone)
    resume = Path(settled.training.resume).expanduser()
    if anew or settled.training.resume in ("auto", "never") or not resume.is_dir():
        return name
    if resume.resolve().parent.parent == (settled.output.path / "runs" / name).resolve():
        return name  # its own checkpoint leads to the same result
    return _name(settled, data, backbone, start=identity(resume))


def _name(settled: Config, data: str, backbone: str | None, start: str = "") -> str:
    def named(hash8: str) -> str:
        return run_name(
            suite=settled.task.suite,
            task=settled.task.name,
            backbone=settled.backbone,
            protocol=settled.merging.protocol,
            seed=settled.training.seed,
            hash8=hash8,
        )

    output = settled.output.path
    name = named(config.config_hash(settled, data=data, backbone=backbone or "", start=start))
    folder = find_folder(output, name)
    if folder is None and not start and local_backbone(settled.backbone) is None:
        by_name = named(hash_by_name(settled, data=data))
        folder = by_name if may_be_of(output / "runs" / by_name, backbone) else None
    return folder or name
