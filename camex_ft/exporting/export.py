"""Export a finished run: make the other form, measure it beside the run's own, write it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from datasets import Dataset
from transformers import PreTrainedModel

from camex_ft import upcycling
from camex_ft.exporting.dense import dense_model
from camex_ft.exporting.folded import check_foldable, folded_model
from camex_ft.exporting.measure import Exported, Form, difference, seconds
from camex_ft.exporting.routing import MeanRouting, mean_routing
from camex_ft.exporting.writing import check_target, write
from camex_ft.results import RunFolder, load_record
from camex_ft.results.record import Record
from camex_ft.run.inference import Trained, read_run, read_trained
from camex_ft.run.steps import quieten
from camex_ft.utils.errors import UserError, nearest
from camex_ft.utils.registry import PROTOCOLS

FORMS = ("dense", "folded")
SPLITS = ("train", "validation")
ROWS = 512  # of the calibration split: s_bar is a mean, whose error falls with the root of their number


def export(
    run: Path | str,
    out: Path | str,
    *,
    as_: str = "dense",
    split: str = "train",
    rows: int = ROWS,
    license: str | None = None,
) -> Exported:
    """Write a finished run's model to a folder in another form, with its tokenizer, numbers and card.

    Args:
        run: the run's folder.
        out: a new or empty folder.
        as_: "dense": the original architecture, merged once with the mean routing weights; "folded": experts without
            curvature and masks, merged for every input.
        split: whose first rows the mean is over: "train" or "validation".
        rows: how many.
        license: of the weights, for the card: an identifier of the hub.

    Raises:
        UserError: there is no finished run, its model or data is gone, it has nothing to fold, or `out` is in use.
    """
    form = _one_of("--as", as_, FORMS)
    where = _one_of("--split", split, SPLITS)
    if rows < 1:
        raise UserError(f"--rows: expected at least 1, got {rows}")
    target = check_target(Path(out))
    quieten()
    read_run(run)
    record = load_record(RunFolder(Path(run)).path)
    if form == "folded":
        check_foldable(PROTOCOLS.get(record.protocol))
    made = _make(read_trained(run), record, cast(Form, form), where, rows, target)
    exported, model, done = made
    task = done.data.task
    write(model, done.tokenizer, target, exported=exported, head=task.head, task=task, license=license)
    return exported


def _make(
    done: Trained, record: Record, form: Form, split: str, rows: int, target: Path
) -> tuple[Exported, PreTrainedModel, Trained]:
    """Return the export, measured, its model, and the run."""
    calibration = _calibration(done, split, rows)
    with done.trainer() as trainer:
        before = done.metrics(trainer)
        routing = mean_routing(trainer, calibration) if upcycling.expert_layers(done.model) else None
    model = folded_model(done.model) if form == "folded" else dense_model(done.model, _weights(routing))
    with done.trainer(model) as trainer:
        after = done.metrics(trainer)
        far = difference(trainer, done.model, model, calibration)
        spent = seconds(trainer, done.model, model, calibration)
    exported = Exported(
        folder=target,
        form=form,
        record=record,
        split=split if routing else "",
        rows=len(calibration) if routing else 0,
        before=before,
        after=after,
        parameters=(_count(done.model), _count(model)),
        routing=routing,
        difference=far,
        seconds=spent,
        note=done.note,
    )
    return exported, model.cpu(), done


def _weights(routing: MeanRouting | None) -> dict:
    return {} if routing is None else dict(routing.weights)


def _calibration(done: Trained, split: str, rows: int) -> Dataset:
    """Return the first encoded rows of a split."""
    name = done.data.primary[0] if split == "validation" else done.data.task.splits["train"]
    given = done.data.encoded[name]
    return given.select(range(min(rows, len(given))))


def _count(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _one_of(option: str, given: str, known: tuple[str, ...]) -> str:
    if given not in known:
        raise UserError(f"{option}: unknown '{given}'.{nearest(given, known)} Expected {' or '.join(known)}")
    return given
