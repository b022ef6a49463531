"""The folder of an export, whole or absent: model, tokenizer, numbers and card."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from camex_ft import upcycling
from camex_ft.exporting.measure import Exported, MeanRouting
from camex_ft.results.card import NAME, card
from camex_ft.results.provenance import versions
from camex_ft.results.record import dumps
from camex_ft.results.run_folder import full_disk
from camex_ft.tasks.base import Task
from camex_ft.utils.durable import unfinished, whole_folder
from camex_ft.utils.errors import UserError
from camex_ft.utils.escaping import markdown, markdown_notes, quoted
from camex_ft.utils.folders import writing
from camex_ft.utils.registry import PROTOCOLS

# -- numbers and text -------------------------------------------------------------------------------------------------

FORMAT = 1
TITLES = {"dense": "Cost of merging once", "folded": "Effect of folding"}


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
    routing = exported.routing
    return {
        "format": FORMAT,
        "as": exported.form,
        "run": exported.record.run.name,
        "protocol": exported.record.protocol,
        "calibration": {"split": exported.split, "rows": exported.rows},
        "metrics": {"merged": exported.before, exported.form: exported.after},
        "parameters": {"merged": exported.parameters[0], exported.form: exported.parameters[1]},
        "logits": {"difference": exported.difference.largest, "largest": exported.difference.scale},
        "seconds": {"merged": exported.seconds.before, exported.form: exported.seconds.after},
        "routing": {}
        if routing is None
        else {
            name: {
                "weights": weights.tolist(),
                "entropy": routing.entropy[name],
                "lost": routing.lost[name],
            }
            for name, weights in routing.weights.items()
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
        f"the run's model, {spent.before * 1e3:.3g} ms (x {spent.ratio:.2f}; medians of alternating passes)."
    ]
    if exported.note:
        text.append(f"{exported.note[0].upper()}{exported.note[1:]}.")
    if exported.routing is None:
        text.append("The run has no experts: the export is its model, under the plain class.")
    elif exported.form == "dense":
        text += _routing_text(exported, exported.routing)
    return text


def _routing_text(exported: Exported, routing: MeanRouting) -> list[str]:
    experts = len(next(iter(routing.weights.values())))
    entropy, lost = _range(routing.entropy.values()), _range(routing.lost.values())
    rows = "row" if exported.rows == 1 else "rows"
    text = [
        f"The routing weights are means over the first {exported.rows:,} {rows} of the {exported.split} split. By "
        f"layer, the routing entropy of one input is {entropy} nats (at most {math.log(experts):.3f} with {experts} "
        f"experts); averaging loses {lost} nats of information on the input."
    ]
    if PROTOCOLS.get(exported.record.protocol).form == "outputs":
        text.append(
            f"{quoted(exported.record.protocol)} mixes the outputs of experts and not their weights: the mean expert "
            "has a non-linearity inside and computes another function, even if all inputs are routed alike."
        )
    return text


def _change(before: float, after: float) -> str:
    return f"{round(after - before, 4) + 0.0:+.4f}"  # never -0.0000


def _range(values: Collection[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"


# -- the folder -------------------------------------------------------------------------------------------------------

NUMBERS = "export.json"


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
