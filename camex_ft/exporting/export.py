"""Export a finished run: convert its model, measure it beside the run's own, write the folder, whole or not at all."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from camex_ft import upcycling
from camex_ft.config import RoutingConfig
from camex_ft.exporting.conversion import (
    check_dense,
    check_foldable,
    check_mixture,
    dense_model,
    folded_model,
    mixture_model,
)
from camex_ft.exporting.measure import Exported, Form, difference, mean_routing, seconds
from camex_ft.results import RunFolder, load_record
from camex_ft.results.card import NAME, card
from camex_ft.results.provenance import versions
from camex_ft.results.record import dumps
from camex_ft.results.run_folder import full_disk
from camex_ft.run.inference import read_run, read_trained
from camex_ft.run.steps import quieten
from camex_ft.tasks.base import Task
from camex_ft.utils.durable import unfinished, whole_folder
from camex_ft.utils.errors import UserError, nearest
from camex_ft.utils.escaping import markdown, markdown_notes, quoted
from camex_ft.utils.folders import writing
from camex_ft.utils.registry import PROTOCOLS

TITLES = {  # by form
    "dense": "Cost of merging once",
    "folded": "Effect of folding",
    "experts": "Difference of the mixture",
}
SPLITS = ("train", "validation")
ROWS = 512  # of the calibration split: the error of the mean falls with the root of their number
NUMBERS, FORMAT = "export.json", 1


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
            curvature and masks, merged for every input; "experts": the sparse mixture that the run started from,
            with its experts and routers as trained.
        split: "train" or "validation"; the mean is over its first rows.
        rows: number of these rows.
        license: of the weights, for the card: an identifier of the hub.

    Raises:
        UserError: there is no finished run, its model or data is gone, it has nothing to fold, or `out` is in use.
    """
    for option, value, known in (("--as", as_, tuple(TITLES)), ("--split", split, SPLITS)):
        if value not in known:
            hint = nearest(value, known)
            raise UserError(f"{option}: unknown '{value}'.{hint} Expected {' or '.join(known)}")
    if rows < 1:
        raise UserError(f"--rows: expected at least 1, got {rows}")
    target = check_target(Path(out))
    quieten()
    read_run(run)
    record = load_record(RunFolder(Path(run)).path)
    if as_ == "folded":
        check_foldable(PROTOCOLS.get(record.protocol))
    if as_ == "dense":
        check_dense(record.config.get("upcycle") or {}, PROTOCOLS.get(record.protocol))
    if as_ == "experts":
        sections = record.config
        routing_of_run = RoutingConfig.model_validate(sections.get("routing") or {}, strict=False)
        check_mixture(sections.get("upcycle") or {}, routing_of_run, PROTOCOLS.get(record.protocol))

    trained = read_trained(run)
    task, encoded = trained.data.task, trained.data.encoded
    examples = encoded[trained.data.primary[0] if split == "validation" else task.splits["train"]]
    calibration = examples.select(range(min(rows, len(examples))))
    with trained.trainer() as trainer:
        before = trained.metrics(trainer)
        routing = mean_routing(trainer, calibration) if upcycling.expert_layers(trained.model) else None
    if as_ == "folded":
        model = folded_model(trained.model)
    elif as_ == "experts":
        model = mixture_model(trained.model)
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


# -- numbers and text -------------------------------------------------------------------------------------------------


def lines(exported: Exported) -> list[str]:
    """Return the lines for the terminal: metrics before and after, and the losses."""
    width = max(map(len, exported.after))
    table = [f"{'':{width}}  {'run':>10}  {exported.form:>10}  {'change':>10}"]
    for name, after in exported.after.items():
        before = exported.before[name]
        table.append(f"{name:{width}}  {before:10.4f}  {after:10.4f}  {_change(before, after):>10}")
    return [*table, "", *_text(exported)]


def sections(exported: Exported) -> list[tuple[str, str]]:
    """Return the card's section, the same in Markdown."""
    rows = [
        f"| {markdown(name)} | {exported.before[name]:.4f} | {after:.4f} | {_change(exported.before[name], after)} |"
        for name, after in exported.after.items()
    ]
    head = f"| metric | the run's model | {exported.form} | change |"
    table = "\n".join([head, "|---|---|---|---|", *rows])
    return [(TITLES[exported.form], "\n\n".join([table, *map(markdown_notes, _text(exported))]))]


def numbers(exported: Exported) -> dict[str, Any]:
    """Return all measurements, for ``export.json``; nothing in it is private."""
    routing, form = exported.routing, exported.form
    return {
        "format": FORMAT,
        "as": form,
        "run": exported.record.run.name,
        "protocol": exported.record.protocol,
        "calibration": {"split": exported.split, "rows": exported.rows},
        "metrics": {"merged": exported.before, form: exported.after},
        "parameters": {"merged": exported.parameters[0], form: exported.parameters[1]},
        "logits": {"difference": exported.difference.largest, "largest": exported.difference.scale},
        "seconds": {"merged": exported.seconds.before, form: exported.seconds.after},
        "routing": {}
        if routing is None
        else {
            name: {"weights": s.tolist(), "entropy": routing.entropy[name], "lost": routing.lost[name]}
            for name, s in routing.weights.items()
        },
        "versions": versions(),
    }


def _text(exported: Exported) -> list[str]:
    """Return the paragraphs on logits, parameters, time and routing."""
    logits, spent = exported.difference, exported.seconds
    before, after = exported.parameters
    text = [
        f"The logits differ by at most {logits.largest:.2g} (the largest is {logits.scale:.3g}). The export has "
        f"{after:,} parameters; the run's model has {before:,}. A forward pass takes {spent.after * 1e3:.3g} ms; with "
        f"the run's model, {spent.before * 1e3:.3g} ms (x {spent.after / spent.before:.2f}; medians of "
        "alternating passes)."
    ]
    if exported.note:
        text.append(f"{exported.note[0].upper()}{exported.note[1:]}.")
    if exported.routing is None:
        text.append("The run has no experts: the export is its model, under the plain class.")
    elif exported.form == "dense":
        experts = len(next(iter(exported.routing.weights.values())))
        entropy, lost = _range(exported.routing.entropy.values()), _range(exported.routing.lost.values())
        rows = "row" if exported.rows == 1 else "rows"
        text.append(
            f"The routing weights are means over the first {exported.rows:,} {rows} of the {exported.split} split. By "
            f"layer, the routing entropy of one input is {entropy} nats (at most {math.log(experts):.3f} with "
            f"{experts} experts); averaging loses {lost} nats of information on the input."
        )
    elif exported.form == "experts" and PROTOCOLS.get(exported.record.protocol).form != "outputs":
        text.append(
            f"{quoted(exported.record.protocol)} merges weights of experts; the mixture has these experts and routers, "
            "routes each token by itself and mixes the experts' outputs. It computes another function."
        )
        if PROTOCOLS.get(exported.record.protocol).form == "outputs":
            text.append(
                f"{quoted(exported.record.protocol)} mixes the outputs of experts and not their weights: the mean "
                "expert has a non-linearity inside and computes another function, even if all inputs are routed alike."
            )
    return text


def _change(before: float, after: float) -> str:
    return f"{round(after - before, 4) + 0.0:+.4f}"  # never -0.0000


def _range(values: Collection[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"


# -- the folder -------------------------------------------------------------------------------------------------------


def check_target(target: Path) -> Path:
    """Return the folder's path, with links resolved; `UserError` unless it is new or empty and can be written.

    The folder is replaced as a whole, so its parent has to be writable.
    """
    with writing(target):  # a name that cannot be written raises here, too
        target = target.expanduser()
        if target.is_dir():
            target = target.resolve()
        with suppress(FileNotFoundError):
            unfinished(target).lstat()
        empty = target.is_dir() and not any(target.iterdir())
        if empty and target.is_mount():
            raise ValueError("it is a file system of its own; expected a new folder in it")
        if empty or not os.path.lexists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=target.parent):
                return target
    raise UserError(f"{target} is there already: expected a new or empty folder, so that nothing is mixed")


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    exported: Exported,
    *,
    task: Task,
    license: str | None,
) -> None:
    """Write the folder of an export.

    Raises:
        UserError: there is no room.
    """
    metric = exported.record.metrics.primary
    split = next(name for name in exported.before if name.endswith(f"_{metric}")).removesuffix(metric)
    text = card(
        exported.record,
        head=task.head,
        task=task,
        form="adapter" if upcycling.adapters.has_adapter(model) else exported.form,
        metrics={k.removeprefix(split): v for k, v in exported.after.items() if k.startswith(split)},
        license=license,
        sections=sections(exported),
    )
    target = exported.folder
    with full_disk(str(target)), whole_folder(target) as folder:
        upcycling.save(model, folder)
        tokenizer.save_pretrained(folder)
        (folder / NUMBERS).write_text(dumps(numbers(exported), indent=2) + "\n", encoding="utf-8")
        (folder / NAME).write_text(text, encoding="utf-8")
        check_target(target)  # again: it may have been filled meanwhile
