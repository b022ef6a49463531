"""Export a finished run: convert its model, measure it beside the run's own, write the folder."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from camex_ft import upcycling
from camex_ft.exporting.conversion import check_foldable, dense_model, folded_model
from camex_ft.exporting.measure import Exported, Form, difference, mean_routing, seconds
from camex_ft.exporting.writing import check_target, write
from camex_ft.results import RunFolder, load_record
from camex_ft.run.inference import read_run, read_trained
from camex_ft.run.steps import quieten
from camex_ft.utils.errors import UserError, nearest
from camex_ft.utils.registry import PROTOCOLS

FORMS = ("dense", "folded")
SPLITS = ("train", "validation")
ROWS = 512  # of the calibration split: the error of the mean falls with the root of their number


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
        split: "train" or "validation"; the mean is over its first rows.
        rows: number of these rows.
        license: of the weights, for the card: an identifier of the hub.

    Raises:
        UserError: there is no finished run, its model or data is gone, it has nothing to fold, or `out` is in use.
    """
    _check_option("--as", as_, FORMS)
    _check_option("--split", split, SPLITS)
    if rows < 1:
        raise UserError(f"--rows: expected at least 1, got {rows}")
    target = check_target(Path(out))
    quieten()
    read_run(run)
    record = load_record(RunFolder(Path(run)).path)
    if as_ == "folded":
        check_foldable(PROTOCOLS.get(record.protocol))

    trained = read_trained(run)
    task, encoded = trained.data.task, trained.data.encoded
    examples = encoded[trained.data.primary[0] if split == "validation" else task.splits["train"]]
    calibration = examples.select(range(min(rows, len(examples))))
    with trained.trainer() as trainer:
        before = trained.metrics(trainer)
        routing = mean_routing(trainer, calibration) if upcycling.expert_layers(trained.model) else None
    if as_ == "folded":
        model = folded_model(trained.model)
    else:
        model = dense_model(trained.model, routing.weights if routing else {})
    with trained.trainer(model) as trainer:
        exported = Exported(
            folder=target,
            form=cast(Form, as_),
            record=record,
            split=split if routing else "",
            rows=len(calibration) if routing else 0,
            before=before,
            after=trained.metrics(trainer),
            parameters=(trained.model.num_parameters(), model.num_parameters()),
            routing=routing,
            difference=difference(trainer, trained.model, model, calibration),
            seconds=seconds(trainer, trained.model, model, calibration),
            note=trained.note,
        )
    write(model.cpu(), trained.tokenizer, exported, task=task, license=license)
    return exported


def _check_option(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{option}: unknown '{value}'.{nearest(value, known)} Expected {' or '.join(known)}")
