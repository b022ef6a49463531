"""The command that starts the processes of a run: accelerate's launcher with one of ``configs/accelerate/``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from camex_ft.config.shipped import engine_file
from camex_ft.launching.placement import DEVICES, Placement


def command_line(placed: Placement, arguments: Sequence[str], *, logs: Path) -> list[str]:
    """Return the arguments that start the processes of this node.

    Args:
        placed: where they go.
        arguments: of ``camex-ft``, such as ``["run", "glue"]``.
        logs: the folder for what each process prints.
    """
    several: list[str] = []
    if placed.address is not None:
        host, port = placed.address
        several = ["--machine_rank", str(placed.node), "--main_process_ip", host]
    else:
        port = 0  # any that is free
    name = "cpu" if placed.device == "cpu" and placed.engine == "ddp" else placed.engine
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(engine_file(name))),
        *("--num_processes", str(placed.all), "--num_machines", str(placed.nodes), *several),
        *("--main_process_port", str(port)),
        *("--num_cpu_threads_per_process", str(_threads(placed))),
        *("--log_dir", str(logs), "--tee", "3"),
        *("-m", "camex_ft", *arguments),
    ]


def environment(placed: Placement) -> dict[str, str]:
    """Return the variables that the processes need beside those of this one."""
    return {"ACCELERATE_USE_CPU": "true", DEVICES: ""} if placed.device == "cpu" else {}


def _threads(placed: Placement) -> int:
    given = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(given) if given.isdigit() and int(given) else max(cores // placed.processes, 1)
