"""Where processes go: what was asked for, what SLURM fills in, and every way in which it does not fit."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from camex_ft.config.shipped import engine_file, find_config
from camex_ft.launching import placement
from camex_ft.launching.placement import ENGINES, PORT, Machine, Placement, command_line, environment, place
from camex_ft.utils.errors import UserError

STEP = {
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "node[07-09]",
    "SLURM_JOB_ID": "41234567",
}


def machine(gpus: int = 0, *, deepspeed: bool = False, **variables: str) -> Machine:
    return Machine(
        gpus=lambda: gpus,
        has=lambda package: deepspeed,
        variables=variables,
        first_host=lambda hosts: {"node[07-09]": "node07"}[hosts],
    )


@pytest.mark.parametrize(
    ("asked", "here", "expected"),
    [
        ({}, machine(8), None),
        ({"gpus": 4}, machine(8), {"device": "gpu", "processes": 4}),
        ({"gpus": 1}, machine(8), {"device": "gpu", "processes": 1}),
        ({"cpus": 3}, machine(8), {"device": "cpu", "processes": 3}),
        ({"cpus": 2, "engine": "fsdp"}, machine(), {"device": "cpu", "processes": 2, "engine": "fsdp"}),
        ({"engine": "fsdp"}, machine(8), {"device": "gpu", "processes": 8, "engine": "fsdp"}),
        ({"gpus": 2, "engine": "zero2"}, machine(2, deepspeed=True), {"processes": 2, "engine": "zero2"}),
        (
            {"cpus": 2, "nodes": 3, "node": 1, "address": "first:4000"},
            machine(),
            {"processes": 2, "nodes": 3, "node": 1, "address": ("first", 4000), "all": 6, "first": 2},
        ),
        ({"cpus": 1, "nodes": 2, "node": 0, "address": "first"}, machine(), {"address": ("first", PORT)}),
        (
            {"gpus": 8},
            machine(8, **STEP),
            {"nodes": 3, "node": 2, "address": ("node07", 24567), "all": 24, "first": 16},
        ),
        ({"gpus": 8, "nodes": 1}, machine(8, **STEP), {"nodes": 1, "address": None}),
        ({"gpus": 2, "node": 0, "address": "a:1"}, machine(8, **STEP), {"node": 0, "address": ("a", 1)}),
    ],
)
def test_what_is_asked_for_is_placed(asked: dict[str, Any], here: Machine, expected: dict[str, Any] | None):
    placed = place(**asked, machine=here)
    assert (placed is None) == (expected is None)
    assert {name: getattr(placed, name) for name in expected or {}} == (expected or {})


@pytest.mark.parametrize(
    ("asked", "here", "message"),
    [
        ({"gpus": 2, "cpus": 2}, machine(8), "--gpus and --cpus: expected one of them"),
        ({"gpus": 4}, machine(2), r"--gpus 4: only 2 visible here; expected --gpus 2"),
        ({"gpus": 4}, machine(2, CUDA_VISIBLE_DEVICES="1,3"), r"here \(CUDA_VISIBLE_DEVICES=1,3\)"),
        ({"gpus": 4}, machine(), "no GPU is visible here; expected --cpus 4"),
        ({"engine": "ddp"}, machine(), "--engine: no GPU is visible here; add --cpus N"),
        ({"nodes": 2}, machine(), "--nodes: no GPU is visible here"),
        ({"cpus": 2, "engine": "fspd"}, machine(), r"there is no 'fspd'. Did you mean 'fsdp'\?"),
        ({"cpus": 2, "engine": "zero3"}, machine(), "zero3 needs GPUs, and --cpus asks for none"),
        ({"gpus": 2, "engine": "zero2"}, machine(2), "the package deepspeed is not installed: pip install"),
        ({"gpus": 1, "engine": "fsdp"}, machine(2), "is for several processes, and this is one"),
        ({"cpus": 2, "node": 1}, machine(), "--node-rank is for several nodes"),
        ({"cpus": 2, "address": "a:1"}, machine(), "--main-address is for several nodes"),
        (
            {"cpus": 2, "nodes": 2},
            machine(),
            "the rank of this node is missing: add --node-rank, from 0 to 1",
        ),
        ({"cpus": 2, "nodes": 2, "node": 2}, machine(), "--node-rank 2: expected 0 to 1"),
        ({"cpus": 2, "nodes": 2, "node": 1}, machine(), "add --main-address HOST:PORT"),
        (
            {"cpus": 2, "nodes": 2, "node": 1, "address": "a:b"},
            machine(),
            "--main-address a:b: expected HOST:PORT",
        ),
        ({"cpus": 2, "nodes": 2, "node": 1, "address": "a:70000"}, machine(), "expected HOST:PORT"),
        ({"cpus": 2}, machine(RANK="1", WORLD_SIZE="4"), "this is already rank 1 of 4"),
        ({"gpus": 8, "nodes": 2}, machine(8, **STEP), "this step of SLURM has 3"),
        ({"gpus": 8}, machine(8, **{**STEP, "SLURM_STEP_NUM_TASKS": "24"}), "srun --ntasks-per-node=1"),
    ],
)
def test_what_does_not_fit_is_refused(asked: dict[str, Any], here: Machine, message: str):
    with pytest.raises(UserError, match=message):
        place(**asked, machine=here)


def test_scontrol_names_the_first_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "scontrol"
    script.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[07-09]" ] && printf "node07\\nnode08\\n"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert placement.first_host("node[07-09]") == "node07"
    for wrong in ("", "#!/bin/sh\nexit 1\n"):
        script.write_text(wrong or "#!/bin/sh\n")
        with pytest.raises(UserError, match="add --main-address HOST:PORT"):
            placement.first_host("node[07-09]")


def test_a_lone_process_sees_one_gpu_and_those_on_the_cpu_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(placement.DEVICES, " 3,5")
    placement.show(Placement(device="gpu", processes=2))
    assert os.environ[placement.DEVICES] == " 3,5"
    placement.show(Placement(device="gpu", processes=1))
    assert os.environ[placement.DEVICES] == "3"
    placement.show(Placement(device="cpu", processes=2))
    assert os.environ[placement.DEVICES] == ""


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [*ENGINES, "cpu"])
def test_accelerate_takes_the_command(engine: str):
    """Parsed by accelerate itself, with the engine's file: what it would launch."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    placed = Placement(device="gpu", processes=2, engine=engine, nodes=2, node=1, address=("first", 4000))
    line = command_line(placed, ["run", "glue", "a.b=c d", "--force"], logs=Path("some/logs"))
    assert line[1:3] == ["-m", "accelerate.commands.launch"]
    given, file, _ = _validate_launch_command(launch_command_parser().parse_args(line[3:]))
    assert given.training_script_args == ["run", "glue", "a.b=c d", "--force"]
    assert (given.num_processes, given.num_machines, given.machine_rank) == (4, 2, 1)
    assert (given.main_process_ip, given.main_process_port) == ("first", 4000)
    assert (given.log_dir, given.tee, given.module) == ("some/logs", "3", True)
    assert given.rdzv_backend == "static"
    kinds = (bool(given.multi_gpu), bool(given.use_fsdp), bool(given.use_deepspeed))
    assert kinds == (engine in ("ddp", "cpu"), engine == "fsdp", engine.startswith("zero"))
    if engine == "fsdp":
        assert (given.fsdp_version, given.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")
        assert given.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
        assert not given.fsdp_cpu_ram_efficient_loading
    if engine.startswith("zero"):
        assert given.zero_stage == int(engine[-1])
        assert given.deepspeed_multinode_launcher == "standard"
    assert file is not None


def test_processes_on_the_cpu_use_no_gpu_and_share_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    many = command_line(Placement(device="cpu", processes=10_000), ["run"], logs=Path("x"))
    assert many[many.index("--num_cpu_threads_per_process") + 1] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    said = command_line(Placement(device="cpu", processes=2), ["run"], logs=Path("x"))
    assert said[said.index("--num_cpu_threads_per_process") + 1] == "3"
    assert Path(said[said.index("--config_file") + 1]).name == "cpu.yaml"
    assert environment(Placement(device="cpu", processes=2))["ACCELERATE_USE_CPU"] == "true"
    assert environment(Placement(device="gpu", processes=2)) == {}


@pytest.mark.parametrize("name", [*ENGINES, "cpu"])
def test_an_engines_file_is_no_configuration_of_ours(name: str):
    file = engine_file(name)
    assert "distributed_type" in yaml.safe_load(file.read_text(encoding="utf-8"))
    assert not find_config(f"accelerate/{name}").is_file()


def test_launching_imports_no_torch():
    code = "import camex_ft_cli, camex_ft.launching.processes, sys; print('torch' in sys.modules)"
    import sys

    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
