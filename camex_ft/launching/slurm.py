"""Nodes of a step of SLURM (`srun`), read from its variables."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from camex_ft.utils.errors import UserError

# By the job's number, so that two jobs that share a first node do not meet.
FIRST_PORT, PORTS = 20000, 10000


@dataclass(frozen=True, kw_only=True)
class Step:
    """The nodes of a step; all None or empty outside of one."""

    nodes: int | None = None
    node: int | None = None
    hosts: str = ""
    port: int = FIRST_PORT


def read_step(variables: Mapping[str, str], *, nodes: int | None = None) -> Step:
    """Return the step that this process belongs to.

    Args:
        variables: of the environment.
        nodes: how many are asked for; 1 means that the step does not matter.

    Raises:
        UserError: it has several tasks a node, each of which would start all processes; or other than `nodes` nodes.
    """
    there = variables.get("SLURM_STEP_NUM_NODES")
    if there is None or nodes == 1:
        return Step()
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
    return Step(
        nodes=int(there),
        node=int(variables.get("SLURM_NODEID", "0")),
        hosts=hosts,
        port=FIRST_PORT + int(variables.get("SLURM_JOB_ID", "0")) % PORTS,
    )


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
            f"the first of the nodes {hosts} cannot be found ({error}); expected --main-address HOST:PORT"
        ) from error
