"""One way through: config -> data -> backbone -> upcycle -> train -> results."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from camex_ft import config, upcycling
from camex_ft.backbones import content as backbone_content
from camex_ft.backbones.content import Content
from camex_ft.config import Config, Environment
from camex_ft.data import sources
from camex_ft.results import Record, RunFolder, find_done, print_summary
from camex_ft.results.card import NAME as CARD
from camex_ft.results.card import card
from camex_ft.results.experiment import changes, differs
from camex_ft.run.fitting import check_backbone
from camex_ft.run.record_builder import Facts, make_record
from camex_ft.run.steps import load_model, load_splits, made_tokenizer, make_trainer, name_of, quieten
from camex_ft.tasks.base import Prepared, Task
from camex_ft.training.arguments import training_arguments
from camex_ft.training.checkpoint_folder import choose, ended, state_of
from camex_ft.training.cost import Speed, describe
from camex_ft.training.tracking import logging_to
from camex_ft.training.trainer import CamexTrainer
from camex_ft.utils.durable import whole_folder
from camex_ft.utils.errors import UserError
from camex_ft.utils.escaping import printable
from camex_ft.utils.registry import TASKS

MODEL = "model"
PREDICTIONS = "predictions"


def resolve(given: Config, environment: Environment | None = None) -> tuple[Config, str]:
    """Return the configuration with nothing left to `auto`, and in words which profile was picked, and why."""
    return config.resolve(given, environment)


def run(given: Config, *, force: bool = False, callbacks: Iterable[TrainerCallback] = ()) -> Record:
    """Fine-tune, evaluate, write the record and return it. A run that is done is shown and not repeated.

    Args:
        given: the configuration.
        force: run again what is done, from nothing.
        callbacks: more that the Trainer is to call.

    Raises:
        UserError: the input is at fault; as far as possible before a model is built.
    """
    started = time.time()
    quieten()
    settled, reason = resolve(given)
    changed = config.changes(settled.merging, settled.routing, settled.upcycle)
    for line in (reason, *changed, *config.notes(given)):
        say(line)
    task: Task = TASKS.get(settled.task.id)
    splits = load_splits(settled, task)
    content = backbone_content.read(settled.backbone)
    start = Start(started, reason, sources.fingerprint(splits), content)
    name = name_of(settled, start.digest, content.sha256, anew=force)
    folder = RunFolder.create(settled.output.path, name)
    done = None if force else find_done(folder)
    if done is None:
        with alone(folder):
            done = None if force else find_done(folder)  # another process may have come to its end meanwhile
            if done is None:
                for line in changes(settled, name, data=start.digest, backbone=content.sha256):
                    say(line)
                with logging_to(folder.logs, settled.training.trackers):
                    return perform(settled, task, splits, folder, start, force, callbacks)
    if is_first():
        folder.tidy()
    without = settled.output.model and not (folder.path / MODEL).is_dir()
    kept = ", but its model was not kept" if without else ""
    say(f"{folder.path.name} is done already{kept}; --force (make: FORCE=1) runs it again")
    close(done, folder)
    return done


class Start(NamedTuple):
    """Facts of a run before it starts: time, profile and its reason, fingerprint of the data, backbone."""

    time: float
    reason: str
    digest: str
    backbone: Content


def is_first() -> bool:
    """Return whether this is the first of all processes, also before the Trainer's arguments have joined them."""
    return os.environ.get("RANK", "0") == "0"  # as launchers set it


@contextmanager
def alone(folder: RunFolder) -> Iterator[None]:
    """Keep other runs out of the folder while the body runs; the main process does so for all."""
    if is_first():
        with folder.alone():
            yield
    else:
        yield


def perform(
    settled: Config,
    task: Task,
    splits: Mapping[str, datasets.Dataset],
    folder: RunFolder,
    start: Start,
    force: bool,
    callbacks: Iterable[TrainerCallback],
) -> Record:
    """Train, evaluate, and keep what a run leaves, in its folder."""
    try:
        trainer, data = prepare(settled, task, splits, folder, start.backbone.path)
    except UserError:
        if is_first():
            folder.remove_if_empty()  # nothing was done yet: leave nothing behind
        raise
    for callback in callbacks:
        trainer.add_callback(callback)
    resume = "never" if force else settled.training.resume
    backbone = start.backbone.sha256
    elsewhere = resume not in ("auto", "never")
    if elsewhere and differs(Path(resume).expanduser(), data=start.digest, backbone=backbone):
        say(f"training.resume: {resume} is of a run on other data, or of another backbone, than this one")
    counted = describe(cast(PreTrainedModel, trainer.model))  # before an engine takes the parameters apart
    speed, resumed = train(trainer, settled, folder, anew=force)
    facts = Facts(
        name=folder.path.name,
        started=start.time,
        reason=start.reason,
        data_sha256=start.digest,
        speed=speed,
        resumed=resumed,
        counted=counted,
        tokenizer=made_tokenizer(settled, task, trainer.processing_class),
        backbone_sha256=start.backbone.sha256,
    )
    record = make_record(settled, data, trainer, facts)
    keep(trainer, data, folder, record, model=settled.output.model, predictions=settled.task.predict)
    close(record, folder)
    return record


def prepare(
    settled: Config,
    task: Task,
    splits: Mapping[str, datasets.Dataset],
    folder: RunFolder,
    backbone: Path | None = None,
) -> tuple[CamexTrainer, Prepared]:
    """Return the trainer and the data of a run, with all that can be wrong before training found.

    `backbone` is where its files are; None: it is located here.
    """
    if settled.task.predict and not task.files:
        raise task.no_predictions()
    if settled.task.predict and not any(split in splits for split in task.splits["test"]):
        raise UserError(f"task.predict: {task.id} has no test split here; expected one beside the others")
    training_arguments(settled.training, output=folder.checkpoints, best=None)  # its faults, before any work
    check_backbone(settled, task, backbone)
    set_seed(settled.training.seed)
    model, tokenizer = load_model(settled, task, splits, backbone)
    made = made_tokenizer(settled, task, tokenizer)
    if made is not None:
        say(f"{settled.backbone} knows the words of the embedded corpora alone; here its tokenizer is {made}")
    data = Prepared.make(task, splits, tokenizer, settled.task)
    return make_trainer(settled, data, model, tokenizer, folder, tracked=True), data


def keep(
    trainer: CamexTrainer,
    data: Prepared,
    folder: RunFolder,
    record: Record,
    *,
    model: bool,
    predictions: bool,
) -> None:
    """Write model and predictions, where they are wanted, and, last, the record; then the checkpoints have served."""
    made = make_predictions(trainer, data) if predictions else {}
    state = trainer.full_state() if model else None
    if not trainer.is_world_process_zero():
        return
    if model:
        with whole_folder(folder.path / MODEL) as target:
            upcycling.save(cast(PreTrainedModel, trainer.model), target, state=state)
            cast(PreTrainedTokenizerBase, trainer.processing_class).save_pretrained(target)
            (target / CARD).write_text(card(record, head=data.task.head, task=data.task), encoding="utf-8")
    if made:
        with whole_folder(folder.path / PREDICTIONS) as target:
            for split, decided in made.items():
                data.task.submission(decided, data.rows[split], target / data.task.files[split])
    folder.sync_history()
    folder.write_record(record)
    folder.drop_checkpoints()


def say(text: str) -> None:
    """Print a line, in the main process alone."""
    if is_first():
        print(printable(text), flush=True)


def close(record: Record, folder: RunFolder) -> None:
    """Print the closing summary, in the main process alone."""
    if is_first():
        print_summary(record, folder.path)


def train(
    trainer: CamexTrainer, settled: Config, folder: RunFolder, *, anew: bool
) -> tuple[Speed | None, int | None]:
    """Train from the checkpoint that the configuration asks for.

    Return how fast, where there was anything to train, and the step that it went on from, where there was a checkpoint.
    """
    resume = "never" if anew else settled.training.resume
    checkpoint, notes = chosen(resume, folder.checkpoints)
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
            folder.write_config(config.to_yaml(settled))
    if checkpoint is None:
        return trainer.speed(trainer.train().metrics), None
    say(f"going on from {checkpoint.name}")
    state = state_of(checkpoint)
    if ended(state):
        trainer.finish(checkpoint)
        return None, state.global_step
    result = trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer.speed(result.metrics), state.global_step


def chosen(resume: str, folder: Path) -> tuple[Path | None, list[str]]:
    """Return what `choose` does; the main process reads the folder, and tells the others."""
    told: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            told = [choose(resume, folder), None]
        except UserError as error:
            told = [None, str(error)]
    broadcast_object_list(told)
    found, wrong = told
    if wrong is not None:
        raise UserError(wrong)
    return cast("tuple[Path | None, list[str]]", found)


def make_predictions(trainer: CamexTrainer, data: Prepared) -> dict[str, Any]:
    """Return the predictions for every test split; `UserError` if there is none."""
    if not data.test:
        raise UserError(
            f"task.predict: {data.task.id} has no test split here; expected one beside the others"
        )
    return {split: data.predict(split, trainer.collect(data.encoded[split])) for split in data.test}
