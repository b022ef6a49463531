"""A plan as a table for the terminal, and as a JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from camex_ft.errors import UserError
from camex_ft.listing import print_rows
from camex_ft.planning import Column, Plan

OWN = " *"
Rows = list[tuple[str, ...]]
PARAMETERS = ("total", "trainable", "active", "experts", "base", "routers", "curvature", "statistics")
OPERATIONS = ("outside", "maps", "routers", "merging", "curvature", "chain")
MEMORY = ("weights", "gradients", "optimizer", "vectors", "activations")
LABELS = {
    "active": "a token meets",
    "base": "base experts",
    "statistics": "statistics (buffers)",
    "outside": "outside feed-forward",
    "maps": "feed-forward maps",
    "vectors": "domain vectors kept",
    "activations": "activations, about",
}
LEGEND = (
    "* the configuration's own protocol. M: 10^6; MB: 10^6 bytes.",
    "Exact: parameters, weights, gradients, the state of AdamW. By formula: multiply-adds, of matrix",
    "products alone. Estimated: activations, and so the sum, without what kernels use while they run.",
)


def tables(plan: Plan) -> list[tuple[tuple[str, ...], Rows]]:
    """Return the tables, each with its headings: parameters; multiply-adds a token; memory of a training step."""
    names = tuple(column.protocol + (OWN if column.own else "") for column in plan.columns)

    def rows(keys: tuple[str, ...], show: Callable[[Column, str], str]) -> Rows:
        cells = {key: [show(column, key) for column in plan.columns] for key in keys}
        used = [key for key in keys if any(cell != "-" for cell in cells[key])]
        widths = [max(len(name), *(len(cells[key][i]) for key in used)) for i, name in enumerate(names)]
        aligned = {key: [c.rjust(w) for c, w in zip(cells[key], widths, strict=True)] for key in used}
        return [(LABELS.get(key, key), *aligned[key]) for key in used]

    return [
        (("parameters", *names), rows(PARAMETERS, lambda c, key: millions(getattr(c.parameters, key)))),
        (
            ("multiply-adds a token", *names),
            rows((*OPERATIONS, "total"), lambda c, key: millions(getattr(c.operations, key))),
        ),
        (
            ("memory of a step", *names),
            rows((*MEMORY, "total"), lambda c, key: megabytes(getattr(c.memory, key))),
        ),
    ]


def millions(count: float) -> str:
    """Return a count as "1,132.83 M", or whole where it is below a million; "-" for none."""
    if not count:
        return "-"
    return f"{count / 1e6:,.2f} M" if count >= 1e6 else f"{count:,.0f}"


def megabytes(size: float) -> str:
    """Return bytes as "17,824 MB"; "-" for none."""
    if not size:
        return "-"
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def headline(plan: Plan) -> list[str]:
    """Return what the plan is of, in lines."""
    batch, precision = plan.batch, plan.precision
    reads = f"{batch.rows} rows of {batch.length} tokens"
    reads += f" and {batch.target} of the decoder's" if batch.target else ""
    reads += f", {batch.steps} times" if batch.steps > 1 else ""
    how = ["autocast in half precision" if precision.half else "float32", "GPU" if precision.gpu else "CPU"]
    how += ["gradient checkpointing"] if precision.checkpointing else []
    return [*plan.notes, f"{plan.task}, {plan.backbone}; a step: {reads}; {', '.join(how)}"]


def print_plan(plan: Plan, *, console: Console | None = None) -> None:
    """Print the plan to `console` (standard output by default)."""
    console = console or Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    for line in headline(plan):
        say(line)
    for headings, rows in tables(plan):
        print_rows(headings, rows, console=console)
    for column in plan.columns:
        for chain in column.chains:
            say(f"{column.protocol}, chain in the {chain}")
    for line in LEGEND:
        say(line)


def write_json(plan: Plan, path: Path) -> None:
    """Write all numbers of the plan to a file.

    Raises:
        UserError: it can't be written.
    """
    try:
        path.write_text(json.dumps(plan.as_json(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
