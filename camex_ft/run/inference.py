"""Inference with a finished run's model: evaluate it again, predict a file, generate text."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    set_seed,
)

from camex_ft import config, upcycling
from camex_ft.backbones.loading import VOCABULARIES
from camex_ft.config import Config
from camex_ft.data import sources
from camex_ft.results import Record, RunFolder, find_done, load_record
from camex_ft.results.run_folder import SHOWN
from camex_ft.run import donor_texts
from camex_ft.run.pipeline import MODEL, PREDICTIONS
from camex_ft.run.steps import load_model, load_splits, make_trainer, quieten
from camex_ft.tasks.base import Prepared, Task
from camex_ft.tasks.lm import begin_tokens
from camex_ft.training.callbacks.reporting import only_metrics
from camex_ft.training.trainer import CamexTrainer
from camex_ft.upcycling.router_fit import add_intercepts
from camex_ft.utils.durable import whole_folder
from camex_ft.utils.errors import UserError
from camex_ft.utils.folders import writing
from camex_ft.utils.registry import TASKS, positions

GENERATING = ("causal-lm", "seq2seq-lm")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run, loaded to be measured again.

    Attributes:
        settled: its resolved configuration.
        data, model, tokenizer: their present state.
        note: a message if the data differ from those in the record, else "".
    """

    settled: Config
    data: Prepared
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    note: str = ""

    @contextmanager
    def trainer(self, model: PreTrainedModel | None = None) -> Iterator[CamexTrainer]:
        """Yield the run's own trainer for its model or for another one; its files are temporary."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = RunFolder(Path(scratch))
            trainer = make_trainer(self.settled, self.data, model or self.model, self.tokenizer, folder)
            for progress in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(progress)
            yield trainer

    def measure(self, model: PreTrainedModel | None = None) -> dict[str, float]:
        """Return the metrics of the run's model, or of another one, on the validation splits."""
        with self.trainer(model) as trainer:
            return self.metrics(trainer)

    @staticmethod
    def metrics(trainer: CamexTrainer) -> dict[str, float]:
        """Return the metrics of a trainer's model on the validation splits."""
        return only_metrics(trainer.evaluate())


def read_trained(run_folder: Path | str) -> Trained:
    """Return a finished run with model and data; `UserError` if one of them is missing."""
    settled, task = read_run(run_folder)
    model, tokenizer = load_trained(run_folder)
    splits = load_splits(settled, task)
    data = Prepared.make(task, splits, tokenizer, task.within(model.config, settled.task))
    note = changed_data(load_record(run_folder), sources.fingerprint(splits), data)
    return Trained(settled=settled, data=data, model=model, tokenizer=tokenizer, note=note)


def changed_data(record: Record, digest: str, data: Prepared) -> str:
    """Return a message if the data differ from those in a record, else "".

    Args:
        record: of the run.
        digest: SHA-256 of the present data.
        data: the same, prepared.
    """
    if digest == record.data.sha256:
        return ""
    rows = ", ".join(
        f"{split} ({len(data.rows[split]):,} rows, {record.data.rows.get(split, 0):,} then)"
        for split in data.validation
    )
    before, now = record.data.sha256[:SHOWN], digest[:SHOWN]
    return (
        f"the data differ from those of the run: their SHA-256 is {now} now and {before} in the record. Measured on "
        f"the present data: {rows}"
    )


def evaluate(run_folder: Path | str) -> dict[str, float]:
    """Return the metrics of a finished run's model on its validation splits, measured again.

    If the data have changed since the run, a line on standard error says so.

    Raises:
        UserError: there is no finished run there, or its data are missing.
    """
    quieten()
    run = read_trained(run_folder)
    if run.note:
        print(run.note, file=sys.stderr)
    return run.measure()


def predict(run_folder: Path | str, file: Path | str, out: Path | str | None = None) -> Path:
    """Write a finished run's predictions for the examples of a file, in the benchmark's format; return the path.

    Args:
        run_folder: of the run.
        file: jsonl, csv, tsv or parquet with the task's columns.
        out: path of the predictions; by default ``predictions/`` in the run's folder, under the file's name.

    Raises:
        UserError: there is no finished run there, the file is missing or faulty, or the task takes no predictions.
    """
    quieten()
    settled, task = read_run(run_folder)
    if not task.files:
        raise task.no_predictions()
    split = task.splits["test"][0]
    examples = sources.load_file(task, file)
    model, tokenizer = load_trained(run_folder)
    data = Prepared.make(task, {split: examples}, tokenizer, task.within(model.config, settled.task))
    suffix = Path(task.files[split]).suffix
    named = f"{Path(file).stem}{suffix}"
    target = Path(out) if out else RunFolder(Path(run_folder)).own(PREDICTIONS, named)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(settled, data, model, tokenizer, RunFolder(Path(scratch)))
        decided = data.predict(split, trainer.collect(data.encoded[split]))
        with writing(target):
            task.submission(decided, data.rows[split], target)
    return target


def generate(
    run_folder: Path | str,
    prompt: str,
    *,
    tokens: int = 50,
    beams: int = 1,
    sample: bool = False,
    seed: int = 0,
) -> str:
    """Return the text that a finished run's model generates after `prompt`.

    Args:
        run_folder: of the run.
        prompt: the beginning of the text, or the input of an encoder-decoder.
        tokens: maximum number to generate; the model may end the text before.
        beams: of beam search; 1 is greedy.
        sample: draw tokens from the model's distribution instead.
        seed: of the draws.

    Raises:
        UserError: there is no finished run, its model does not generate, or prompt and tokens are too long for it.
    """
    quieten()
    _, task = read_run(run_folder)
    if task.head not in GENERATING:
        raise UserError(
            f"{task.id} is a classification task: its model does not generate text. Expected a run of language "
            "modelling (suite lm) or question answering (suite qa)"
        )
    loaded, tokenizer = load_trained(run_folder)
    model: Any = loaded  # its `generate` is typed as a module's attribute
    causal = task.head == "causal-lm"
    ids = begin_tokens(tokenizer) if causal else []
    ids += tokenizer(prompt, add_special_tokens=not causal, split_special_tokens=True, verbose=False)[
        "input_ids"
    ]
    if not ids:
        raise UserError(
            "the prompt is empty, and the model has no token to begin a text with. Give it some words"
        )
    room = positions(model.config)
    if causal and room is not None and len(ids) + tokens > room:
        raise UserError(
            f"the prompt has {len(ids)} tokens; with {tokens} more it exceeds the {room} positions of the model. Use a "
            f"shorter prompt, or --tokens {max(room - len(ids), 0)} at most"
        )
    inputs = torch.tensor([ids])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        sequences = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            num_beams=beams,
            do_sample=sample,
            use_cache=upcycling.caches(loaded),
        )
    new = sequences[0, len(ids) if causal else 0 :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def fit_router(place: str, overrides: Sequence[str] = (), out: Path | None = None) -> None:
    """Fit the routers of a finished run's model, or of a configuration's, and print their quality.

    Args:
        place: a run's folder, or a configuration.
        overrides: changes to its configuration, such as ``routing.fit.from=[...]``.
        out: a new folder for the fitted model and its tokenizer; None: nothing is written.

    Raises:
        UserError: the run, the configuration or a donor's texts are at fault, or `out` exists.
    """
    if out is not None and out.exists():
        raise UserError(f"--out: {out} exists: expected a new folder")
    quieten()
    run = RunFolder(Path(place))
    is_run = find_done(run) is not None
    source = run.config if is_run else place
    settled, _ = config.resolve(config.load_config(source, [*overrides, "routing.init=fit"]))
    task: Task = TASKS.get(settled.task.id)
    if is_run:
        model, tokenizer = load_trained(place)
    else:
        set_seed(settled.training.seed)
        model, tokenizer = load_model(settled, task, load_splits(settled, task))
    if not upcycling.expert_layers(model):
        raise UserError(
            f"{place}: its model has no experts, and so no routers (protocol '{settled.merging.protocol}')"
        )
    add_intercepts(model)
    donor_texts.fit(settled, model, tokenizer)
    if out is not None:
        with whole_folder(out) as target:
            upcycling.save(model, target)
            tokenizer.save_pretrained(target)
        print(f"wrote {out}")


def read_run(run_folder: Path | str) -> tuple[Config, Task]:
    """Return a finished run's configuration and task; `UserError` if there is none."""
    folder = RunFolder(Path(run_folder))
    if find_done(folder) is None:
        above = Path(run_folder).parent
        near = f" Did you mean {above}?" if find_done(RunFolder(above)) is not None else ""
        raise UserError(
            f"{run_folder}: no finished run here.{near} Runs are in results/runs, each with a record.json"
        )
    settled = config.load_config(str(folder.config), [])
    return settled, TASKS.get(settled.task.id)


def load_trained(run_folder: Path | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a finished run's model, at its best epoch, and tokenizer."""
    folder = Path(run_folder) / MODEL
    if not folder.is_dir():
        raise UserError(
            f"{run_folder} has no model: output.model was false, or it was removed. `camex-ft run "
            f"{run_folder}/config.yaml output.model=true --force` runs it again and saves the model"
        )
    model = upcycling.load(folder)
    try:  # without a vocabulary a tokenizer may load with its special tokens alone
        if not any((folder / name).is_file() for name in VOCABULARIES):
            raise FileNotFoundError(f"none of {', '.join(VOCABULARIES)} is there")
        return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for faulty files
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"{folder}: its tokenizer is not usable: {reason}. Copy the folder again, with all the files of "
            "the run"
        ) from error
