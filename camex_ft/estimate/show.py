"""``camex-ft plan``: a cost estimate as tables for the terminal and as a JSON file, with steps measured beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from camex_ft import config as configuration
from camex_ft.config import Config
from camex_ft.estimate import Column, CostEstimate, Where, plan
from camex_ft.estimate.columns import BANDWIDTH
from camex_ft.estimate.measured import Measured, measure, resident
from camex_ft.estimate.memory import Engine, gpu_here
from camex_ft.utils.durable import write_named
from camex_ft.utils.errors import UserError
from camex_ft.utils.escaping import Rows, print_rows, say
from camex_ft.utils.folders import writing

OWN = " *"
CONTEXT = 600_000_000  # bytes that CUDA takes on a device before there is a tensor, about
UNITS = {"": 2**30, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
PARAMETERS = ("total", "trainable", "active", "experts", "base", "routers", "curvature", "statistics")
OPERATIONS = ("outside", "maps", "routers", "merging", "curvature", "chain")
MEMORY = (
    *("weights", "gradients", "optimizer", "vectors", "activations"),
    *("working", "heap", "framework", "apart", "total"),
)
DURATION = ("computing", "sending", "total")
LABELS = {
    "active": "active for a token",
    "base": "base experts",
    "statistics": "statistics (buffers)",
    "outside": "outside feed-forward",
    "maps": "feed-forward maps",
    "vectors": "domain vectors cached",
    "activations": "activations, about",
    "working": "working memory, about",
    "heap": "heap not given back, about",
    "apart": "not at the same time",
}
LEGEND = (
    "* the configuration's own protocol. M: 10^6; MB: 10^6 bytes.",
    "Exact: parameters, weights, gradients, the state of AdamW. Multiply-adds are",
    "those of matrix products, by formula. The rest of memory is estimated, and with",
    "it the total, which is the peak. Times are those of matrix products alone:",
    "norms, softmax, the optimizer and reading data come on top, and take most of a",
    "step of a small model.",
)


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of ``camex-ft plan``, as they were written.

    Attributes:
        gpus: processes, one a GPU; None: one process on this machine's device.
        engine: of several.
        memory: of a device, such as "24GiB"; None: whether a step fits is not asked.
        measure: also take some steps here.
        tflops: of a device; None: measured or assumed.
        json: a file for every number, or None.
    """

    gpus: int | None = None
    engine: str = "ddp"
    memory: str | None = None
    measure: bool = False
    tflops: float | None = None
    json: Path | None = None


def show_plan(written: Config, options: PlanOptions) -> None:
    """Print a cost estimate, write it to a file and measure it, as the options say.

    Raises:
        UserError: an option or the configuration is at fault.
    """
    if options.measure and options.gpus is not None:
        raise UserError("--measure takes steps in one process on this machine: leave --gpus out")
    engine = Engine(name=options.engine, processes=1 if options.gpus is None else options.gpus)
    limit = None if options.memory is None else parse_size(options.memory)
    gpu = gpu_here() or options.gpus is not None
    where = Where(engine=engine, framework=CONTEXT if gpu else resident())
    estimate = plan(written, gpu=gpu, where=where, tflops=options.tflops, limit=limit)
    print_plan(estimate)
    if options.json is not None:
        write_json(estimate, options.json)
        typer.echo(f"wrote {options.json}")
    if options.measure:
        for line in compare(estimate, measure(configuration.resolve(written, needs=False)[0])):
            typer.echo(line)


def parse_size(text: str) -> int:
    """Return bytes of a size such as "24GiB", "24GB" or "24", which is in GiB.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise UserError(f"--memory: '{text}' is no size; expected one such as 24GiB, 24GB or 512MiB")
    return round(float(match[1]) * unit)


def compare(estimate: CostEstimate, measured: Measured) -> list[str]:
    """Return measured and estimated figures side by side, in lines."""
    own = estimate.own
    assert own is not None
    parameters, memory = own.parameters, own.memory
    peak = f"planned {gibibytes(memory.total)} ({memory.total / measured.peak:.2f} of it)"
    if measured.framework:
        rest, planned = measured.peak - measured.framework, memory.total - memory.framework
        peak += (
            f"; without the framework {gibibytes(rest)}, planned {gibibytes(planned)} ({planned / rest:.2f})"
        )
    return [
        f"measured here, {own.protocol}: {measured.steps} optimizer steps in a separate process",
        f"  parameters   {millions(measured.parameters.total)}, planned {millions(parameters.total)}",
        f"  trained      {millions(measured.parameters.trainable)}, planned {millions(parameters.trainable)}",
        f"  peak memory  {gibibytes(measured.peak)}, {peak}",
        f"  a step       {seconds(measured.seconds)}; its matrix products alone are estimated at "
        f"{seconds(own.duration.total)}",
    ]


def print_plan(estimate: CostEstimate, *, console: Console | None = None) -> None:
    """Print a cost estimate to `console` (standard output by default)."""
    console = console or Console()
    for line in headline(estimate):
        say(console, line)
    for headings, rows in tables(estimate):
        print_rows(headings, rows, console=console)
    for column in estimate.columns:
        for chain in column.chains:
            say(console, f"{column.protocol}, chain in the {chain}")
    for line in (*LEGEND, *verdict(estimate)):
        say(console, line)


def write_json(estimate: CostEstimate, path: Path) -> None:
    """Write all numbers of a cost estimate to a file.

    Raises:
        UserError: it can't be written.
    """
    text = json.dumps(estimate.as_json(), indent=2) + "\n"
    with writing(path):
        write_named(path, text)


def tables(estimate: CostEstimate) -> list[tuple[tuple[str, ...], Rows]]:
    """Return the tables, each with its headings: parameters; multiply-adds a token; memory of a training step;
    the time of its matrix products."""
    names = tuple(column.protocol + (OWN if column.own else "") for column in estimate.columns)

    def rows(keys: tuple[str, ...], show: Callable[[Column, str], str]) -> Rows:
        cells = {key: [show(column, key) for column in estimate.columns] for key in keys}
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
        (("memory of a step", *names), rows(MEMORY, lambda c, key: megabytes(getattr(c.memory, key)))),
        (("products of a step", *names), rows(DURATION, lambda c, key: seconds(getattr(c.duration, key)))),
    ]


def millions(count: float) -> str:
    """Return a count as "1,132.83 M", in full below a million; "-" for none."""
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


def headline(estimate: CostEstimate) -> list[str]:
    """Return the configuration and the circumstances of a step, in lines."""
    batch, setting = estimate.batch, estimate.setting
    precision, engine = setting.precision, setting.where.engine
    reads = f"{batch.rows} rows of {batch.length} tokens"
    reads += f" and {batch.target} of the decoder's" if batch.target else ""
    reads += f", {batch.steps} times" if batch.steps > 1 else ""
    how = ["autocast in half precision" if precision.half else "float32", "GPU" if precision.gpu else "CPU"]
    how += ["gradient checkpointing"] if precision.checkpointing else []
    how += [f"{engine.processes} processes ({engine.name}), figures of each"] if engine.processes > 1 else []
    rate = f"time: {setting.tflops:.3g} TFLOP/s "
    rate += "measured here in a product of matrices" if setting.measured else "assumed"
    if engine.processes > 1:
        rate += f"; sending at {BANDWIDTH / 1e9:g} GB/s, assumed, and not while computing"
    step = f"{estimate.task}, {estimate.backbone}; a step: {reads}; {', '.join(how)}"
    return [*estimate.notes, step, rate]


def verdict(estimate: CostEstimate) -> list[str]:
    """Return whether a step of the own protocol fits, and which settings would make it fit, in lines."""
    advice, own = estimate.advice, estimate.own
    if advice is None or own is None:
        return []
    peak, limit = own.memory.total, advice.limit
    fits = f"a step takes {gibibytes(peak)} at its peak, in the {own.memory.moment} pass; "
    if peak <= limit:
        return [f"fits: {fits}of {gibibytes(limit)}, {100 * peak / limit:.0f} %"]
    lines = [f"does not fit: {fits}there are {gibibytes(limit)}. Changed alone:"]
    width = max((len(" ".join(way.settings)) for way in advice.alone), default=0)
    for way in advice.alone:
        sign = "fits" if way.peak <= limit else "not enough" if way.peak < peak else "no help"
        lines.append(f"  {' '.join(way.settings).ljust(width)}  {gibibytes(way.peak):>10}  {sign}")
    if advice.together is None:
        return [*lines, "all of these together are not enough: a smaller backbone, or more memory"]
    together = f"together: {' '.join(advice.together.settings)}"
    return [*lines, together, f"          {gibibytes(advice.together.peak)}, which fits"]
