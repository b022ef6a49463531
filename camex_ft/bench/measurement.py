"""Times of several sides in one run, and the record of a benchmark in ``results/measurements/``."""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from camex_ft.bench.settings import Bench
from camex_ft.utils import system
from camex_ft.utils.durable import write_atomically
from camex_ft.utils.errors import UserError

DIGITS = 4  # significant ones: more would only be noise
SHOWN = {"kind", "settings", "machine", "times"}  # of a record, before its further figures
MEDIANS = {  # figure -> side
    "dense_s": "dense",
    "dense_step_s": "dense",
    "merged_s": "merged",
    "plain_s": "plain",
    "step_s": "upcycled",
}


def nothing() -> None:
    """Prepare nothing."""


class Side(NamedTuple):
    """One of the things that are compared: `run` is timed, `prepare` comes before every `run` and is not."""

    run: Callable[[], object]
    prepare: Callable[[], object] = nothing


def alternate(sides: Mapping[str, Side], *, repeats: int, device: str) -> dict[str, list[float]]:
    """Return the times of each side in seconds, `repeats` of them.

    Sides take turns, a, b, c, a, b, c, ..., so that all are disturbed alike, after one call of each to warm up.
    """
    for side in sides.values():
        timed(side, device)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            times[name].append(timed(side, device))
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Return each side's median time, in seconds."""
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def timed(side: Side, device: str) -> float:
    """Return the seconds that one run of a side takes."""
    wait = torch.cuda.synchronize if device == "cuda" else nothing
    side.prepare()
    wait()
    start = time.perf_counter()
    side.run()
    wait()
    return time.perf_counter() - start


# -- records ----------------------------------------------------------------------------------------------------------


def make_record(settings: Bench, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record: kind, settings, figures to four digits, machine. Without a date or a host's name."""
    return {
        "kind": settings.name().partition("-")[0],
        "settings": settings.to_record(),
        **{key: rounded(value) for key, value in figures.items()},
        "machine": machine(settings.device),
    }


def machine(device: str) -> dict[str, Any]:
    """Return the properties of the machine that the figures depend on; memory in GiB."""
    return {
        "processor": processor(),
        "cores": system.cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the processor's model, or of its architecture where the system does not tell."""
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def rounded(value: Any) -> Any:
    """Return a value with all its floats, also those in lists and mappings, rounded to four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


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
    """Write ``<name>.json`` into an existing folder, in place of an earlier run's, and return its path."""
    path = folder / f"{name}.json"
    write_atomically(path, to_json(record))
    return path


def table(record: Mapping[str, Any]) -> str:
    """Return settings, a line a side, further figures, and the machine, as text."""
    settings = " ".join(f"{key}={_text(value)}" for key, value in record["settings"].items())
    where = ", ".join(f"{key} {value}" for key, value in record["machine"].items() if value is not None)
    lines = [f"{record['kind']}: {settings}", f"on: {where}", "", "side      median s   least s  times dense"]
    median = {side: record[key] for key, side in MEDIANS.items() if key in record}
    for side, seconds in median.items():
        if seconds is not None:
            least, ratio = min(record["times"][side]), seconds / median["dense"]
            lines.append(f"{side:<9} {seconds:>8.4g}  {least:>8.4g}  {ratio:>11.3g}")
    lines.append("")
    for key in [key for key in record if key not in SHOWN and key not in MEDIANS]:
        value = record[key]
        if isinstance(value, Mapping):
            lines += [f"{key} {name}: {_text(item)}" for name, item in value.items()]
        elif value is not None:
            lines.append(f"{key}: {_text(value)}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
