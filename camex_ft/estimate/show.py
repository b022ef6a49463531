"""A plan as a table for the terminal, and as a JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from camex_ft.estimate import Column, Plan
from camex_ft.estimate.duration import BANDWIDTH
from camex_ft.utils.durable import write_named
from camex_ft.utils.escaping import Rows, print_rows, say
from camex_ft.utils.folders import writing

OWN = " *"
PARAMETERS = ("total", "trainable", "active", "experts", "base", "routers", "curvature", "statistics")
OPERATIONS = ("outside", "maps", "routers", "merging", "curvature", "chain")
MEMORY = (
    "weights",
    "gradients",
    "optimizer",
    "vectors",
    "activations",
    "working",
    "holes",
    "framework",
    "apart",
    "total",
)
DURATION = ("computing", "sending", "total")
LABELS = {
    "active": "a token meets",
    "base": "base experts",
    "statistics": "statistics (buffers)",
    "outside": "outside feed-forward",
    "maps": "feed-forward maps",
    "vectors": "domain vectors kept",
    "activations": "activations, about",
    "working": "working memory, about",
    "holes": "holes in the heap, about",
    "apart": "not at the same time",
}
LEGEND = (
    "* the configuration's own protocol. M: 10^6; MB: 10^6 bytes. A total of memory is the peak.",
    "Exact: parameters, weights, gradients, the state of AdamW. By formula: multiply-adds, of matrix",
    "products alone. Estimated: the rest of memory, and so the peak; the time of matrix products, from",
    "multiply-adds. Norms, softmax, the optimizer, data and calls of kernels come on top: in small",
    "models they are most of a step.",
)


def tables(plan: Plan) -> list[tuple[tuple[str, ...], Rows]]:
    """Return the tables, each with its headings: parameters; multiply-adds a token; memory of a training step;
    the time of its matrix products."""
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
            rows(MEMORY, lambda c, key: megabytes(getattr(c.memory, key))),
        ),
        (
            ("products of a step", *names),
            rows(DURATION, lambda c, key: seconds(getattr(c.duration, key))),
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
    return f"{size / 1e6:,.0f} MB" if abs(size) >= 1e7 else f"{size / 1e6:.2f} MB"


def seconds(time: float) -> str:
    """Return a time as "1.25 s" or "12.5 ms"; "-" for none."""
    if not time:
        return "-"
    return f"{time:,.2f} s" if time >= 1 else f"{time * 1e3:,.2f} ms"


def gibibytes(size: float) -> str:
    """Return bytes as "12.25 GiB"."""
    return f"{size / 2**30:,.2f} GiB"


def headline(plan: Plan) -> list[str]:
    """Return what the plan is of, in lines."""
    batch, precision, where = plan.batch, plan.setting.precision, plan.setting.where
    reads = f"{batch.rows} rows of {batch.length} tokens"
    reads += f" and {batch.target} of the decoder's" if batch.target else ""
    reads += f", {batch.steps} times" if batch.steps > 1 else ""
    how = ["autocast in half precision" if precision.half else "float32", "GPU" if precision.gpu else "CPU"]
    how += ["gradient checkpointing"] if precision.checkpointing else []
    engine = where.engine
    how += [f"{engine.processes} processes ({engine.name}), figures of each"] if engine.processes > 1 else []
    rate = f"time: {plan.setting.tflops:.3g} TFLOP/s "
    rate += "measured here in a product of matrices" if plan.setting.measured else "assumed"
    if engine.processes > 1:
        rate += f"; sending at {BANDWIDTH / 1e9:g} GB/s, assumed, and not while computing"
    return [*plan.notes, f"{plan.task}, {plan.backbone}; a step: {reads}; {', '.join(how)}", rate]


def verdict(plan: Plan) -> list[str]:
    """Return whether the own protocol's step fits, and what would make it, in lines."""
    advice, own = plan.advice, plan.own
    if advice is None or own is None:
        return []
    peak, limit = own.memory.total, advice.limit
    fits = f"a step takes {gibibytes(peak)} at its peak, in the {own.memory.moment} pass; "
    if peak <= limit:
        return [f"fits: {fits}of {gibibytes(limit)}, {100 * peak / limit:.0f} %"]
    lines = [f"does not fit: {fits}there are {gibibytes(limit)}. By itself would make it:"]
    width = max(len(" ".join(way.settings)) for way in advice.alone) if advice.alone else 0
    for way in advice.alone:
        sign = "fits" if way.peak <= limit else "not enough" if way.peak < peak else "no help"
        lines.append(f"  {' '.join(way.settings).ljust(width)}  {gibibytes(way.peak):>10}  {sign}")
    if advice.together is None:
        return [*lines, "all of these together are not enough: a smaller backbone, or more memory"]
    ways = " ".join(sorted(advice.together.settings, key=lambda setting: not setting[0].isupper()))
    return [*lines, f"together: {ways}", f"          {gibibytes(advice.together.peak)}, which fits"]


def print_plan(plan: Plan, *, console: Console | None = None) -> None:
    """Print the plan to `console` (standard output by default)."""
    console = console or Console()

    for line in headline(plan):
        say(console, line)
    for headings, rows in tables(plan):
        print_rows(headings, rows, console=console)
    for column in plan.columns:
        for chain in column.chains:
            say(console, f"{column.protocol}, chain in the {chain}")
    for line in (*LEGEND, *verdict(plan)):
        say(console, line)


def write_json(plan: Plan, path: Path) -> None:
    """Write all numbers of the plan to a file.

    Raises:
        UserError: it can't be written.
    """
    text = json.dumps(plan.as_json(), indent=2) + "\n"
    with writing(path):
        write_named(path, text)
