"""Write and print the record of a benchmark, ``<kind>-<protocol>-<shape>.json`` in ``results/measurements/``."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from camex_ft.bench import memory
from camex_ft.bench.settings import Bench
from camex_ft.utils.durable import write_atomically
from camex_ft.utils.errors import UserError

DIGITS = 4  # significant ones: more would only be noise


def make_record(settings: Bench, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record: kind, settings, figures to four digits, machine. Without a date or a host's name."""
    kind = settings.name().partition("-")[0]
    return {
        "kind": kind,
        "settings": settings.to_record(),
        **{key: rounded(value) for key, value in figures.items()},
        "machine": machine(settings.device),
    }


def machine(device: str) -> dict[str, Any]:
    """Return what the figures depend on beside the settings; memory in GiB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory.total() / memory.GIB),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the processor's model, or of its architecture where the system does not tell."""
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    try:  # macOS
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return platform.machine()


def rounded(value: Any) -> Any:
    """Return a value with all its floats, also those in lists and mappings, rounded to four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def to_json(record: Mapping[str, Any]) -> str:
    """Return the record as JSON, a line an entry."""
    entries = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    return "{\n" + ",\n".join(entries) + "\n}\n"


def make_folder(folder: Path) -> None:
    """Make the folder of the records if need be.

    Raises:
        UserError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--save: '{folder}' cannot be written: {error.strerror or error}") from error


def save(record: Mapping[str, Any], name: str, folder: Path) -> Path:
    """Write ``<name>.json`` into a folder that is there, in place of an earlier run's, and return its path."""
    path = folder / f"{name}.json"
    write_atomically(path, to_json(record))
    return path


# -- for people -------------------------------------------------------------------------------------------------------


def table(record: Mapping[str, Any]) -> str:
    """Return settings, a line a side, what follows from them, and the machine, as text."""
    settings = " ".join(f"{key}={_text(value)}" for key, value in record["settings"].items())
    where = ", ".join(f"{key} {value}" for key, value in record["machine"].items() if value is not None)
    return "\n".join(
        [f"{record['kind']}: {settings}", f"on: {where}", "", *_sides(record), "", *_rest(record)]
    )


def _sides(record: Mapping[str, Any]) -> list[str]:
    dense = "dense_s" if record["kind"] == "layer" else "dense_step_s"
    medians = {"dense": record[dense]}
    if record["kind"] == "layer":
        medians |= {"merged": record["merged_s"], "plain": record["plain_s"]}
    else:
        medians |= {"upcycled": record["step_s"]}
    rows = [("side", "median s", "least s", "times dense")]
    for side, median in medians.items():
        if median is not None:
            least = min(record["times"][side])
            rows.append((side, f"{median:.4g}", f"{least:.4g}", f"{median / medians['dense']:.3g}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _rest(record: Mapping[str, Any]) -> list[str]:
    shown = {
        "kind",
        "settings",
        "machine",
        "times",
        "dense_s",
        "merged_s",
        "plain_s",
        "dense_step_s",
        "step_s",
    }
    lines = []
    for key, value in record.items():
        if isinstance(value, Mapping) and key not in shown:
            lines += [f"{key} {name}: {_text(each)}" for name, each in value.items()]
        elif key not in shown and value is not None:
            lines.append(f"{key}: {_text(value)}")
    return lines


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
