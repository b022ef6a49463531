"""Placement of a run's processes: how many, device, engine, nodes. Checked before any starts."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from camex_ft.launching import slurm
from camex_ft.utils.errors import UserError, nearest

ENGINES = ("ddp", "fsdp", "zero2", "zero3")
CPU_ENGINES = ("ddp", "fsdp")
PORT = 29500
DEVICES = "CUDA_VISIBLE_DEVICES"


def gpus_here() -> int:
    """Return how many GPUs this process may use. NVML is asked, so that CUDA is not initialised before `show`."""
    import torch

    return torch.cuda.device_count()


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The processes of one run.

    Attributes:
        device: what each process has to itself.
        processes: on each node.
        engine: one of `ENGINES`.
        nodes: how many there are.
        node: the rank of this one.
        address: host and port of the first node; None on a single one.
    """

    device: Literal["gpu", "cpu"]
    processes: int
    engine: str = "ddp"
    nodes: int = 1
    node: int = 0
    address: tuple[str, int] | None = None

    @property
    def all(self) -> int:
        """Processes on all nodes together."""
        return self.processes * self.nodes

    @property
    def first(self) -> int:
        """The rank of the first process of this node."""
        return self.processes * self.node

    def __str__(self) -> str:
        """The same in words."""
        where = f", node {self.node} of {self.nodes}" if self.nodes > 1 else ""
        return f"{self.all} processes ({self.device}, {self.engine}){where}"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Answers about this machine that `place` asks for; tests put in answers of their own."""

    gpus: Callable[[], int] = gpus_here
    has: Callable[[str], bool] = lambda package: importlib.util.find_spec(package) is not None
    variables: Mapping[str, str] = field(default_factory=lambda: os.environ)
    first_host: Callable[[str], str] = slurm.first_host


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
    """Return where the processes of a run go, or None where nothing was asked for.

    Args:
        gpus, cpus: processes on each node, one a GPU or several on the CPU; by default all visible GPUs, if engine or
            nodes ask for several processes.
        engine: one of `ENGINES`; ddp if left out.
        nodes, node, address: of several machines: how many, which this is, and ``HOST:PORT`` of the first. Left out,
            they are those of a step of SLURM (`srun`), if this is one.
        machine: what there is.

    Raises:
        UserError: there is less than is asked for, or what is asked for does not fit together.
    """
    machine = machine or Machine()
    if (gpus, cpus, engine, nodes, node, address) == (None,) * 6:
        return None
    _check(gpus, cpus, engine, machine.variables)
    step = slurm.read_step(machine.variables, nodes=nodes)
    nodes = nodes or step.nodes or 1
    if nodes == 1 and (node or address):
        name = "--node-rank" if node else "--main-address"
        raise UserError(f"{name} is for several nodes; expected --nodes 2 or more beside it")
    if cpus is None and gpus is None:
        gpus = machine.gpus()
        if not gpus:
            asked = "--nodes" if nodes > 1 else "--engine" if engine else "--node-rank"
            raise UserError(
                f"{asked}: no GPU is visible here; expected --cpus N beside it, processes on the CPU"
            )
    placed = Placement(
        device="cpu" if gpus is None else "gpu",
        processes=cpus or gpus or 1,
        engine=engine or "ddp",
        nodes=nodes,
    )
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
        raise UserError("--gpus and --cpus: expected one of them, the processes are all of one kind")
    if engine is not None and engine not in ENGINES:
        raise UserError(
            f"--engine: there is no '{engine}'.{nearest(engine, ENGINES)} Known: {', '.join(ENGINES)}"
        )
    if cpus is not None and engine is not None and engine not in CPU_ENGINES:
        raise UserError(
            f"--engine {engine} needs GPUs, and --cpus asks for none; expected {' or '.join(CPU_ENGINES)}"
        )


def _check_devices(placed: Placement, *, asked: str | None, machine: Machine) -> None:
    there = machine.gpus() if placed.device == "gpu" else 0
    if placed.device == "gpu" and placed.processes > there:
        found = f"only {there} visible here" if there else "no GPU is visible here"
        limited = f" ({DEVICES}={machine.variables[DEVICES]})" if DEVICES in machine.variables else ""
        instead = (
            f"--gpus {there}" if there else f"--cpus {placed.processes} for as many processes on the CPU"
        )
        raise UserError(f"--gpus {placed.processes}: {found}{limited}; expected {instead}")
    if asked and placed.all == 1:
        raise UserError(
            f"--engine {asked}: an engine joins several processes, and this is one; leave it out, or ask for more by "
            f"--{placed.device}s or --nodes"
        )
    if placed.engine.startswith("zero") and not machine.has("deepspeed"):
        raise UserError(
            f"--engine {placed.engine}: the package deepspeed is not installed: pip install deepspeed. "
            "--engine fsdp shards as much and needs nothing more"
        )


def _among_nodes(
    placed: Placement, node: int | None, address: str | None, step: slurm.Step, machine: Machine
) -> Placement:
    if node is None:
        raise UserError(
            f"--nodes {placed.nodes}: which of them is this? Expected --node-rank 0 to {placed.nodes - 1}"
        )
    if not 0 <= node < placed.nodes:
        raise UserError(f"--node-rank {node}: expected 0 to {placed.nodes - 1} of --nodes {placed.nodes}")
    if address is None and step.hosts:
        return replace(placed, node=node, address=(machine.first_host(step.hosts), step.port))
    if address is None:
        raise UserError(
            f"--nodes {placed.nodes}: expected --main-address HOST:PORT, where the others find the first of them"
        )
    return replace(placed, node=node, address=_read_address(address))


def _read_address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon:
        return text, PORT
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--main-address {text}: expected HOST:PORT, such as node001:{PORT}")
    return host, int(port)


def show(placed: Placement) -> None:
    """Set the GPUs that this process sees: none where the CPU was asked for; one where a single process runs."""
    if placed.device == "cpu":
        os.environ[DEVICES] = ""
    elif placed.all == 1:
        os.environ[DEVICES] = os.environ.get(DEVICES, "0").partition(",")[0].strip()
