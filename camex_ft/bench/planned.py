"""``camex-ft plan``: what is asked for, planned, and measured where that is wanted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import typer

from camex_ft import config as configuration
from camex_ft.bench import memory
from camex_ft.bench.measured import Measured, measure
from camex_ft.config import Config
from camex_ft.estimate import Column, Plan, Where, plan
from camex_ft.estimate.engines import Engine
from camex_ft.estimate.memory import gpu_here
from camex_ft.estimate.show import gibibytes, millions, print_plan, seconds, write_json
from camex_ft.utils.errors import UserError

CONTEXT = 600_000_000  # bytes that CUDA takes on a device before there is a tensor, about
UNITS = {"": 2**30, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, kw_only=True)
class Request:
    """Arguments of `camex-ft plan`, as they were written.

    Attributes:
        gpus: processes, one a GPU; None: one process on what is here.
        engine: of several.
        memory: of a device, such as "24GiB"; None: whether it fits is not asked.
        measure: take some steps here.
        tflops: what a device sustains; None: measured or assumed.
        json: a file for every number, or None.
    """

    gpus: int | None = None
    engine: str = "ddp"
    memory: str | None = None
    measure: bool = False
    tflops: float | None = None
    json: Path | None = None


def show_plan(written: Config, request: Request) -> None:
    """Print a plan, write it where that is wanted, and measure it.

    Raises:
        UserError: an option is at fault, or the configuration is.
    """
    if request.measure and request.gpus is not None:
        raise UserError("--measure takes steps in one process on this machine: leave --gpus out")
    engine = Engine(name=request.engine, processes=1 if request.gpus is None else request.gpus)
    limit = None if request.memory is None else parse_size(request.memory)
    gpu = gpu_here() or request.gpus is not None
    where = Where(
        engine=engine, framework=CONTEXT if gpu else memory.resident(), mapped=not gpu and Where.maps()
    )
    made = plan(written, gpu=gpu, where=where, tflops=request.tflops, limit=limit)
    print_plan(made)
    if request.json is not None:
        write_json(made, request.json)
        typer.echo(f"wrote {request.json}")
    if request.measure:
        for line in compare(made, measure(configuration.resolve(written, needs=False)[0])):
            typer.echo(line)


def compare(made: Plan, measured: Measured) -> list[str]:
    """Return what was measured beside what was planned, in lines."""
    own = made.own
    assert own is not None
    return [
        f"measured here, {own.protocol}: {measured.steps} optimizer steps in a process of their own",
        f"  parameters   {millions(measured.parameters.total)}, planned {millions(own.parameters.total)}",
        f"  trained      {millions(measured.parameters.trainable)}, planned {millions(own.parameters.trainable)}",
        f"  peak memory  {gibibytes(measured.peak)}, {_beside(own, measured)}",
        f"  a step       {seconds(measured.seconds)}; its matrix products alone are estimated at "
        f"{seconds(own.duration.total)}",
    ]


def parse_size(given: str) -> int:
    """Return bytes of a size such as "24GiB", "24GB" or "24", which is in GiB.

    Raises:
        UserError: it is no size.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", given)
    unit = UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise UserError(f"--memory: '{given}' is no size; expected one such as 24GiB, 24GB or 512MiB")
    return round(float(found[1]) * unit)


def _beside(own: Column, measured: Measured) -> str:
    ratio, alone = own.memory.total / measured.peak, own.memory.total - own.memory.framework
    text = f"planned {gibibytes(own.memory.total)} ({ratio:.2f} of it)"
    if not measured.framework:
        return text
    rest = measured.peak - measured.framework
    return f"{text}; without the framework {gibibytes(rest)}, planned {gibibytes(alone)} ({alone / rest:.2f})"
