"""Placement of a run's processes: number, device, engine and nodes, checked first; and the command that starts them.

The nodes of a step of SLURM (`srun`) are read from its variables.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from camex_ft.config.shipped import engine_file
from camex_ft.utils import system
from camex_ft.utils.errors import UserError, among

ENGINES = ("ddp", "fsdp", "zero2", "zero3")
CPU_ENGINES = ("ddp", "fsdp")
PORT = 29500
FIRST_PORT, PORTS = 20000, 10000  # by the job's number, so that two jobs that share a first node do not meet
DEVICES = "CUDA_VISIBLE_DEVICES"


class SlurmStep(NamedTuple):
    """The nodes of a step; all None or empty outside of one."""

    nodes: int | None = None
    node: int | None = None
    hosts: str = ""
    port: int = FIRST_PORT


def read_step(variables: Mapping[str, str], *, nodes: int | None = None) -> SlurmStep:
    """Return the step of SLURM that this process belongs to; `nodes` is of the option, and 1 ignores the step.

    Raises:
        UserError: it has several tasks a node, each of which would start all processes, or not `nodes` nodes.
    """
    there = variables.get("SLURM_STEP_NUM_NODES")
    if there is None or nodes == 1:
        return SlurmStep()
    if variables.get("SLURM_STEP_NUM_TASKS", there) != there:
        raise UserError(
            f"this step of SLURM has {variables['SLURM_STEP_NUM_TASKS']} tasks on {there} nodes, and camex-ft "
            "starts the processes of a node itself; expected srun --ntasks-per-node=1"
        )
    if nodes is not None and nodes != int(there):
        raise UserError(
            f"--nodes {nodes}: this step of SLURM has {there}; leave it out, or expected --nodes {there}"
        )
    hosts = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
    node, job = (int(variables.get(name, "0")) for name in ("SLURM_NODEID", "SLURM_JOB_ID"))
    return SlurmStep(int(there), node, hosts, FIRST_PORT + job % PORTS)


def first_host(hosts: str) -> str:
    """Return the first of a list of hosts as SLURM writes it: ``node[001-004]`` -> ``node001``.

    Raises:
        UserError: scontrol, which reads such lists, is not there or does not answer.
    """
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", hosts], check=True, capture_output=True, text=True, timeout=30
        )
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise UserError(
            f"the first of the nodes {hosts} cannot be found ({error}): add --main-address HOST:PORT"
        ) from error


def gpus_here() -> int:
    """Return the number of visible GPUs, by NVML, so that CUDA is not initialised before `show`."""
    import torch

    return torch.cuda.device_count()


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The processes of one run."""

    device: Literal["gpu", "cpu"]
    processes: int  # on each node
    engine: str = "ddp"
    nodes: int = 1  # number of machines
    node: int = 0  # rank of this one
    address: tuple[str, int] | None = None  # host and port of the first node; None on a single one

    @property
    def all(self) -> int:
        """Processes on all nodes together."""
        return self.processes * self.nodes

    @property
    def first(self) -> int:
        """The rank of the first process of this node."""
        return self.processes * self.node

    def __str__(self) -> str:
        where = f", node {self.node} of {self.nodes}" if self.nodes > 1 else ""
        return f"{self.all} processes ({self.device}, {self.engine}){where}"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine as `place` sees it; tests replace its functions."""

    gpus: Callable[[], int] = gpus_here
    has: Callable[[str], bool] = lambda package: importlib.util.find_spec(package) is not None
    variables: Mapping[str, str] = field(default_factory=lambda: os.environ)
    first_host: Callable[[str], str] = first_host


def place(
    *,
    gpus: int | None = None,
    cpus: int | None = None,
    engine: str | None = None,
    nodes: int | None = None,
    node: int | None = None,
    address: str | None = None,
    machine: Machine | None = None,
) -> Placement | None:
    """Return the placement of a run's processes, or None if no option asks for one.

    Args:
        gpus, cpus: processes on each node, one a GPU or several on the CPU; by default all visible GPUs, if engine or
            nodes ask for several processes.
        engine: one of `ENGINES`; ddp if left out.
        nodes, node, address: of several machines: how many, which this is, and ``HOST:PORT`` of the first. Left out,
            they are those of a step of SLURM (`srun`), if this is one.

    Raises:
        UserError: the machine has less than the options ask for, or the options contradict each other.
    """
    machine = machine or Machine()
    if (gpus, cpus, engine, nodes, node, address) == (None,) * 6:
        return None
    _check(gpus, cpus, engine, machine.variables)
    step = read_step(machine.variables, nodes=nodes)
    nodes = nodes or step.nodes or 1
    if nodes == 1 and (node or address):
        name = "--node-rank" if node else "--main-address"
        raise UserError(f"{name} is for several nodes: add --nodes 2 or more")
    if cpus is None and gpus is None:
        gpus = machine.gpus()
        if not gpus:
            asked = "--nodes" if nodes > 1 else "--engine" if engine else "--node-rank"
            raise UserError(f"{asked}: no GPU is visible here; add --cpus N for processes on the CPU")
    device: Literal["gpu", "cpu"] = "cpu" if gpus is None else "gpu"
    placed = Placement(device=device, processes=cpus or gpus or 1, engine=engine or "ddp", nodes=nodes)
    _check_devices(placed, asked=engine, machine=machine)
    if nodes == 1:
        return placed
    return _among_nodes(placed, node if node is not None else step.node, address, step, machine)


def _check(gpus: int | None, cpus: int | None, engine: str | None, variables: Mapping[str, str]) -> None:
    if int(variables.get("WORLD_SIZE", "1")) > 1 and "RANK" in variables:
        raise UserError(
            f"--gpus, --cpus, --engine and --nodes start processes, and this is already rank {variables['RANK']} of "
            f"{variables['WORLD_SIZE']}; leave them out under torchrun or accelerate launch"
        )
    if gpus is not None and cpus is not None:
        raise UserError("--gpus and --cpus: expected one of them, not both")
    if engine is not None and engine not in ENGINES:
        raise UserError(f"--engine: there is no '{engine}'.{among(engine, ENGINES)}")
    if cpus is not None and engine is not None and engine not in CPU_ENGINES:
        raise UserError(
            f"--engine {engine} needs GPUs, and --cpus asks for none; expected {' or '.join(CPU_ENGINES)}"
        )


def _check_devices(placed: Placement, *, asked: str | None, machine: Machine) -> None:
    there = machine.gpus() if placed.device == "gpu" else 0
    if placed.device == "gpu" and placed.processes > there:
        visible = f"only {there} visible here" if there else "no GPU is visible here"
        limited = f" ({DEVICES}={machine.variables[DEVICES]})" if DEVICES in machine.variables else ""
        instead = (
            f"--gpus {there}" if there else f"--cpus {placed.processes} for as many processes on the CPU"
        )
        raise UserError(f"--gpus {placed.processes}: {visible}{limited}; expected {instead}")
    if asked and placed.all == 1:
        raise UserError(
            f"--engine {asked} is for several processes, and this is one: leave it out, or ask for more with "
            f"--{placed.device}s or --nodes"
        )
    if placed.engine.startswith("zero") and not machine.has("deepspeed"):
        raise UserError(
            f"--engine {placed.engine}: the package deepspeed is not installed: pip install deepspeed. "
            "--engine fsdp shards as much without it"
        )


def _among_nodes(
    placed: Placement, node: int | None, address: str | None, step: SlurmStep, machine: Machine
) -> Placement:
    if node is None:
        raise UserError(
            f"--nodes {placed.nodes}: the rank of this node is missing: add --node-rank, from 0 to {placed.nodes - 1}"
        )
    if not 0 <= node < placed.nodes:
        raise UserError(f"--node-rank {node}: expected 0 to {placed.nodes - 1} of --nodes {placed.nodes}")
    if address is None and step.hosts:
        return replace(placed, node=node, address=(machine.first_host(step.hosts), step.port))
    if address is None:
        raise UserError(
            f"--nodes {placed.nodes}: the address of the first node is missing: add --main-address HOST:PORT"
        )
    host, _, port = (address if ":" in address else f"{address}:{PORT}").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--main-address {address}: expected HOST:PORT, such as node001:{PORT}")
    return replace(placed, node=node, address=(host, int(port)))


def show(placed: Placement) -> None:
    """Set the visible GPUs of this process: none for the CPU, the first for a single process."""
    if placed.device == "cpu":
        os.environ[DEVICES] = ""
    elif placed.all == 1:
        os.environ[DEVICES] = os.environ.get(DEVICES, "0").partition(",")[0].strip()


def command_line(placed: Placement, arguments: Sequence[str], *, logs: Path) -> list[str]:
    """Return the command that starts the processes of this node: accelerate's launcher with an engine's file.

    The arguments are those of ``camex-ft``, such as ``run glue``.
    """
    host, port = placed.address or ("", 0)  # any port that is free
    several = ["--machine_rank", str(placed.node), "--main_process_ip", host] if host else []
    name = "cpu" if placed.device == "cpu" and placed.engine == "ddp" else placed.engine
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if not threads.isdigit() or not int(threads):
        threads = str(max(system.cores() // placed.processes, 1))
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(engine_file(name))),
        *("--num_processes", str(placed.all), "--num_machines", str(placed.nodes), *several),
        *("--main_process_port", str(port)),
        *("--num_cpu_threads_per_process", threads),
        *("--log_dir", str(logs), "--tee", "3"),
        *("-m", "camex_ft", *arguments),
    ]


def environment(placed: Placement) -> dict[str, str]:
    """Return the environment variables that the processes need beside those of this one."""
    return {"ACCELERATE_USE_CPU": "true", DEVICES: ""} if placed.device == "cpu" else {}
