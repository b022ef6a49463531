"""``camex-ft doctor``: versions, devices, hub, cache and disk of this machine, as a run would find them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from camex_ft.results.provenance import PACKAGES, SOURCES, host_kind
from camex_ft.utils import system
from camex_ft.utils.escaping import one_line, say

State = Literal["ok", "note", "wrong"]
COLOURS: Mapping[State, str] = {"ok": "green", "note": "yellow", "wrong": "red"}
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
ROOM = 10e9  # bytes: checkpoints of a base-sized model with eight experts


class Finding(NamedTuple):
    """One line of the report: subject, state, detail."""

    subject: str
    state: State
    detail: str


def diagnose() -> list[Finding]:
    """Return all findings; writes nothing. One request goes to the hub unless it is set offline."""
    from camex_ft.config import Config, resolve

    recent: State = "ok" if sys.version_info >= (3, 10) else "wrong"
    free = shutil.disk_usage(Path.cwd()).free
    return [
        Finding("Python", recent, f"{platform.python_version()} ({sys.executable})"),
        *packages(),
        *devices(),
        *hub(os.environ),
        Finding("disk", "ok" if free > ROOM else "note", f"{free / 1e9:.0f} GB free in {Path.cwd()}"),
        Finding("profile auto", "ok", resolve(Config())[1].removeprefix("profile ")),
    ]


def packages() -> list[Finding]:
    """Report missing core packages and those whose version is not that of constraints.txt."""
    tested = read_constraints(SOURCES / "constraints.txt")
    findings = []
    for name in PACKAGES:
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "wrong", "not installed: run make install"))
            continue
        # A local part such as +cpu is another build of the same release.
        if name in tested and installed.split("+")[0] != tested[name]:
            findings.append(Finding(name, "note", f"{installed}; tested with {tested[name]}"))
    if findings:
        return findings
    if not tested:
        missing = "all installed; constraints.txt is missing, so that versions are not compared"
        return [Finding("packages", "note", missing)]
    return [Finding("packages", "ok", f"all {len(PACKAGES)} as tested")]


def read_constraints(file: Path) -> dict[str, str]:
    """Return name -> version of the pins that hold for this Python; empty if there is no such file."""
    from packaging.requirements import Requirement

    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    held = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    return {pin.name.lower(): next(iter(pin.specifier)).version for pin in held}


def devices() -> list[Finding]:
    """Report the GPUs or CPU cores, engines for several processes, optional GPU packages, and bf16."""
    import torch
    from torch import distributed

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(i) for i in range(gpus)]
    device = f"{host_kind(names)}: torch {torch.__version__} sees no CUDA device"
    if gpus:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        device = f"{host_kind(names)}, {memory:.0f} GiB each, CUDA {torch.version.cuda}"
    serves = {"deepspeed": "engines zero2 and zero3", "bitsandbytes": "8-bit optimizers"}
    missing = [name for name in serves if importlib.util.find_spec(name) is None]
    nccl = distributed.is_available() and distributed.is_nccl_available()
    gloo = distributed.is_available() and distributed.is_gloo_available()
    engines = ", ".join(["ddp", "fsdp", *(["zero2", "zero3"] if "deepspeed" not in missing else [])])
    several = (
        f"--gpus up to {gpus}, engines {engines}" if gpus > 1 else f"{gpus} GPUs: --gpus needs two or more"
    )
    optional = "; ".join(f"{name} is not installed: no {serves[name]}" for name in missing)
    bf16 = gpus > 0 and torch.cuda.is_bf16_supported(including_emulation=False)
    return [
        Finding("device", "ok" if gpus else "note", device),
        Finding(
            "several GPUs",
            "ok" if gpus > 1 and nccl else "note",
            several + ("" if nccl else "; torch has no NCCL"),
        ),
        Finding(
            "several CPUs", "ok" if gloo else "wrong", f"--cpus, engines ddp, fsdp; {system.cores()} cores"
        ),
        Finding(
            "GPU packages",
            "note" if missing else "ok",
            optional or "deepspeed and bitsandbytes are installed",
        ),
        Finding("bf16", "ok" if bf16 else "note", "in hardware" if bf16 else "no GPU here supports it"),
    ]


def hub(variables: Mapping[str, str]) -> list[Finding]:
    """Report whether the Hugging Face hub answers, or the variables that set it offline; and what its cache holds."""
    from huggingface_hub import constants

    offline = [name for name in OFFLINE if variables.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}]
    state: State = "note"
    if offline:
        detail = f"not asked: {', '.join(offline)} is set"
    elif system.hub_answers():
        state, detail = "ok", f"{constants.ENDPOINT} answers"
    else:
        detail = f"{constants.ENDPOINT} does not answer"
    folder = Path(constants.HF_HUB_CACHE)
    count = sum(1 for kind in ("models", "datasets") for _ in folder.glob(f"{kind}--*"))
    return [
        Finding("hub", state, detail),
        Finding("hub cache", "ok" if count else "note", f"{folder}: {count} models and data sets"),
    ]


def print_diagnosis(findings: Iterable[Finding], *, console: Console | None = None) -> None:
    """Print the findings: in colour on a terminal, as ``subject: [state] detail`` lines elsewhere."""
    console = console or Console()
    table = Table("", "", "")
    for subject, state, detail in findings:
        if console.is_terminal:
            table.add_row(subject, f"[{COLOURS[state]}]{state}[/]", Text(one_line(detail)))
        else:
            say(console, f"{subject}: [{state}] {detail}")
    if console.is_terminal:
        console.print(table)
