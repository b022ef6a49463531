"""``camex-ft doctor``: versions, devices, hub, cache and disk of this machine, as a run would find them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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


@dataclass(frozen=True)
class Finding:
    """One line of the report: subject, state, detail."""

    subject: str
    state: State
    detail: str


def diagnose() -> list[Finding]:
    """Return all findings; writes nothing. One request goes to the hub unless it is set offline."""
    return [
        python(),
        *packages(),
        devices(),
        *processes(),
        hub(os.environ),
        cache(),
        disk(Path.cwd()),
        profile(),
    ]


def python() -> Finding:
    """Report the interpreter."""
    state: State = "ok" if sys.version_info >= (3, 10) else "wrong"
    return Finding("Python", state, f"{platform.python_version()} ({sys.executable})")


def packages(tested: Mapping[str, str] | None = None) -> list[Finding]:
    """Report missing core packages and those whose version is not the `tested` one (of constraints.txt by default)."""
    tested = read_constraints(SOURCES / "constraints.txt") if tested is None else tested
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
    detail = (
        f"all {len(PACKAGES)} as tested"
        if tested
        else "all installed; constraints.txt is missing, so that versions are not compared"
    )
    return [Finding("packages", "ok" if tested else "note", detail)]


def read_constraints(file: Path) -> dict[str, str]:
    """Return name -> version of the pins that hold for this Python; empty if there is no such file."""
    from packaging.requirements import Requirement

    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    held = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    return {pin.name.lower(): next(iter(pin.specifier)).version for pin in held}


def devices() -> Finding:
    """Report the GPUs, or the number of CPU cores."""
    import torch

    if not torch.cuda.is_available():
        return Finding("device", "note", f"{host_kind()}: torch {torch.__version__} sees no CUDA device")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Finding("device", "ok", f"{host_kind(names)}, {memory:.0f} GiB each, CUDA {torch.version.cuda}")


def processes() -> list[Finding]:
    """Report the engines and backends for several processes, optional GPU packages, and bf16."""
    import torch
    from torch import distributed

    gpus = torch.cuda.device_count()
    zero = importlib.util.find_spec("deepspeed") is not None
    nccl = distributed.is_available() and distributed.is_nccl_available()
    gloo = distributed.is_available() and distributed.is_gloo_available()
    engines = ["ddp", "fsdp", *(["zero2", "zero3"] if zero else [])]
    ready = (
        f"--gpus up to {gpus}, engines {', '.join(engines)}"
        if gpus > 1
        else f"{gpus} GPUs: --gpus needs two or more"
    )
    findings = [
        Finding(
            "several GPUs",
            "ok" if gpus > 1 and nccl else "note",
            ready + ("" if nccl else "; torch has no NCCL"),
        ),
        Finding(
            "several CPUs", "ok" if gloo else "wrong", f"--cpus, engines ddp, fsdp; {system.cores()} cores"
        ),
    ]
    missing = [name for name in ("deepspeed", "bitsandbytes") if importlib.util.find_spec(name) is None]
    serves = {"deepspeed": "engines zero2 and zero3", "bitsandbytes": "8-bit optimizers"}
    detail = "; ".join(f"{name} is not installed: no {serves[name]}" for name in missing)
    findings.append(
        Finding(
            "GPU packages", "note" if missing else "ok", detail or "deepspeed and bitsandbytes are installed"
        )
    )
    bf16 = gpus > 0 and torch.cuda.is_bf16_supported(including_emulation=False)
    return [
        *findings,
        Finding("bf16", "ok" if bf16 else "note", "in hardware" if bf16 else "no GPU here supports it"),
    ]


def hub(variables: Mapping[str, str]) -> Finding:
    """Report whether the Hugging Face hub answers, or the variables that set it offline."""
    from huggingface_hub import constants

    from camex_ft.utils.system import hub_answers

    offline = [name for name in OFFLINE if variables.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}]
    if offline:
        return Finding("hub", "note", f"not asked: {', '.join(offline)} is set")
    if not hub_answers():
        return Finding("hub", "note", f"{constants.ENDPOINT} does not answer")
    return Finding("hub", "ok", f"{constants.ENDPOINT} answers")


def cache() -> Finding:
    """Report the folder of the hub cache, and the number of models and data sets in it."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    cached = [p for kind in ("models", "datasets") for p in folder.glob(f"{kind}--*")]
    return Finding("hub cache", "ok" if cached else "note", f"{folder}: {len(cached)} models and data sets")


def disk(folder: Path) -> Finding:
    """Report the free disk space of a folder."""
    free = shutil.disk_usage(folder).free
    return Finding("disk", "ok" if free > ROOM else "note", f"{free / 1e9:.0f} GB free in {folder}")


def profile() -> Finding:
    """Report the profile that `auto` picks here, with the reason."""
    from camex_ft.config import Config, resolve

    return Finding("profile auto", "ok", resolve(Config())[1].removeprefix("profile "))


def print_diagnosis(findings: Iterable[Finding], *, console: Console | None = None) -> None:
    """Print the findings: in colour on a terminal, as ``subject: [state] detail`` lines elsewhere."""
    console = console or Console()
    if not console.is_terminal:
        for f in findings:
            say(console, f"{f.subject}: [{f.state}] {f.detail}")
        return
    table = Table("", "", "")
    for f in findings:
        table.add_row(f.subject, f"[{COLOURS[f.state]}]{f.state}[/]", Text(one_line(f.detail)))
    console.print(table)
