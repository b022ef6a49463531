"""A run from its configuration to its record: config -> data -> backbone -> upcycle -> train -> results."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from camex_ft import config, upcycling
from camex_ft.backbones.donors import checkpoints_of, content_of
from camex_ft.config import Config, resolve
from camex_ft.data import sources
from camex_ft.results import Record, RunFolder, find_done, print_summary
from camex_ft.results.card import NAME as CARD
from camex_ft.results.card import card
from camex_ft.results.run_folder import changes, differs
from camex_ft.run import donor_texts
from camex_ft.run.fitting import check_backbone
from camex_ft.run.record_builder import TrainingResult, make_record
from camex_ft.run.steps import (
    RunInputs,
    load_model,
    load_splits,
    make_trainer,
    name_of,
    quieten,
    trained_tokenizer,
)
from camex_ft.tasks.base import Prepared, Task
from camex_ft.training.arguments import training_arguments
from camex_ft.training.callbacks.reporting import logging_to
from camex_ft.training.checkpoint_folder import choose, ended, state_of
from camex_ft.training.cost import describe
from camex_ft.training.trainer import CamexTrainer
from camex_ft.upcycling.router_fit import FitQuality
from camex_ft.utils.durable import whole_folder
from camex_ft.utils.errors import UserError
from camex_ft.utils.escaping import printable
from camex_ft.utils.registry import TASKS

MODEL = "model"
PREDICTIONS = "predictions"


def run(written: Config, *, force: bool = False, callbacks: Iterable[TrainerCallback] = ()) -> Record:
    """Fine-tune, evaluate, write the record and return it. A finished run is shown and not repeated.

    Args:
        written: the configuration.
        force: run again from nothing, even if the run is finished.
        callbacks: further callbacks of the Trainer.

    Raises:
        UserError: the input is at fault; as far as possible before a model is built.
    """
    started = time.time()
    quieten()
    settled, reason = resolve(written)
    changed = config.changes_of(settled)
    for line in (reason, *changed, *config.notes(written)):
        say(line)
    task: Task = TASKS.get(settled.task.id)
    splits = load_splits(settled, task)
    data_sha256 = sources.fingerprint(splits)
    backbone = content_of(settled.backbone, checkpoints_of(settled.upcycle))
    name = name_of(settled, data_sha256, backbone.sha256, anew=force)
    inputs = RunInputs(
        started=started,
        settled=settled,
        reason=reason,
        task=task,
        splits=splits,
        data_sha256=data_sha256,
        backbone=backbone,
        folder=RunFolder.create(settled.output.path, name),
        force=force,
    )
    record = None if force else find_done(inputs.folder)
    if record is None:
        with alone(inputs.folder):
            record = (
                None if force else find_done(inputs.folder)
            )  # another process may have finished it meanwhile
            if record is None:
                for line in changes(settled, name, data=data_sha256, backbone=backbone.sha256):
                    say(line)
                with logging_to(inputs.folder.logs, settled.training.trackers):
                    return perform(inputs, callbacks)
    if is_first():
        inputs.folder.tidy()
    lacks_model = settled.output.model and not (inputs.folder.path / MODEL).is_dir()
    missing = ", but its model was not kept" if lacks_model else ""
    say(f"{inputs.folder.path.name} is done already{missing}; --force (make: FORCE=1) runs it again")
    show(record, inputs.folder)
    return record


def perform(inputs: RunInputs, callbacks: Iterable[TrainerCallback] = ()) -> Record:
    """Train, evaluate, and write the results into the run's folder."""
    try:
        trainer, data, fitted = prepare(inputs)
    except UserError:
        if is_first():
            inputs.folder.remove_if_empty()
        raise
    for callback in callbacks:
        trainer.add_callback(callback)
    counts = describe(cast(PreTrainedModel, trainer.model))  # before an engine shards the parameters
    result = train(trainer, inputs)
    record = make_record(inputs, data, trainer, counts, result, fitted)
    write_results(trainer, data, inputs, record)
    show(record, inputs.folder)
    return record


def prepare(inputs: RunInputs) -> tuple[CamexTrainer, Prepared, dict[str, FitQuality]]:
    """Return the trainer and the data of a run, and the quality of its fitted routers, if they are.

    Faults of the input are found before the model is built.
    """
    settled, task, splits = inputs.settled, inputs.task, inputs.splits
    if settled.task.predict and not task.files:
        raise task.no_predictions()
    if settled.task.predict and not any(split in splits for split in task.splits["test"]):
        raise UserError(f"task.predict: {task.id} has no test split here; expected one beside the others")
    training_arguments(settled.training, output=inputs.folder.checkpoints, best=None)  # raises for its faults
    check_backbone(settled, task, inputs.backbone.path)
    set_seed(settled.training.seed)
    model, tokenizer = load_model(settled, task, splits, inputs.backbone.path)
    new_tokenizer = trained_tokenizer(settled, task, tokenizer)
    if new_tokenizer is not None:
        say(
            f"{settled.backbone} knows only the words of the embedded corpora; its tokenizer is now {new_tokenizer}"
        )
    data = Prepared.make(task, splits, tokenizer, settled.task)
    fits = settled.routing.init == "fit" and bool(upcycling.expert_layers(model))
    fitted = donor_texts.fit(settled, model, tokenizer, say=say) if fits else {}
    return make_trainer(settled, data, model, tokenizer, inputs.folder, tracked=True), data, fitted


def train(trainer: CamexTrainer, inputs: RunInputs) -> TrainingResult:
    """Train from nothing or from the checkpoint that the configuration asks for."""
    folder, resume = inputs.folder, inputs.resume
    if resume not in ("auto", "never"):
        other = Path(resume).expanduser()
        if differs(other, data=inputs.data_sha256, backbone=inputs.backbone.sha256):
            say(f"training.resume: {resume} is of a run on other data, or of another backbone, than this one")
    checkpoint, notes = choose_together(resume, folder.checkpoints)
    for note in notes:
        say(note)
    if checkpoint is not None:
        trainer.check(checkpoint)
    with trainer.args.main_process_first(local=False, desc="preparing the run's folder"):
        if trainer.is_world_process_zero():
            if checkpoint is None:
                folder.clear()
            else:
                folder.rewind_history(state_of(checkpoint).global_step)
            folder.write_config(config.to_yaml(inputs.settled))
    if checkpoint is None:
        return TrainingResult(speed=trainer.speed(trainer.train().metrics))
    say(f"going on from {checkpoint.name}")
    state = state_of(checkpoint)
    if ended(state):
        trainer.finish(checkpoint)
        return TrainingResult(resumed=state.global_step)
    metrics = trainer.train(resume_from_checkpoint=str(checkpoint)).metrics
    return TrainingResult(speed=trainer.speed(metrics), resumed=state.global_step)


def write_results(trainer: CamexTrainer, data: Prepared, inputs: RunInputs, record: Record) -> None:
    """Write predictions and model, if wanted, and then the record; remove the checkpoints."""
    settled, folder, task = inputs.settled, inputs.folder, data.task
    predictions: dict[str, Any] = {}
    if settled.task.predict:
        predictions = {
            split: data.predict(split, trainer.collect(data.encoded[split])) for split in data.test
        }
    state = trainer.full_state() if settled.output.model else None  # all processes gather it
    if not trainer.is_world_process_zero():
        return
    if settled.output.model:
        with whole_folder(folder.path / MODEL) as target:
            upcycling.save(cast(PreTrainedModel, trainer.model), target, state=state)
            cast(PreTrainedTokenizerBase, trainer.processing_class).save_pretrained(target)
            (target / CARD).write_text(card(record, head=task.head, task=task), encoding="utf-8")
    if predictions:
        with whole_folder(folder.path / PREDICTIONS) as target:
            for split, decided in predictions.items():
                task.submission(decided, data.rows[split], target / task.files[split])
    folder.sync_history()
    folder.write_record(record)
    folder.drop_checkpoints()


# -- several processes ------------------------------------------------------------------------------------------------


def is_first() -> bool:
    """Return whether this is the first of all processes; also valid before the Trainer's arguments have joined them."""
    return os.environ.get("RANK", "0") == "0"  # set by launchers


def say(text: str) -> None:
    """Print a line, in the first process alone."""
    if is_first():
        print(printable(text), flush=True)


def show(record: Record, folder: RunFolder) -> None:
    """Print the closing summary, in the first process alone."""
    if is_first():
        print_summary(record, folder.path)


@contextmanager
def alone(folder: RunFolder) -> Iterator[None]:
    """Keep other runs out of the folder while the body runs; the first process does so for all."""
    if is_first():
        with folder.alone():
            yield
    else:
        yield


def choose_together(resume: str, folder: Path) -> tuple[Path | None, list[str]]:
    """Return the checkpoint and the notes of `choose`, the same in all processes; the main one reads the folder."""
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome = [choose(resume, folder), None]
        except UserError as error:
            outcome = [None, str(error)]
    broadcast_object_list(outcome)
    chosen, message = outcome
    if message is not None:
        raise UserError(message)
    return cast("tuple[Path | None, list[str]]", chosen)
