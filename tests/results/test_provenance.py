"""Versions, commit, host kind, and records without private paths."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
from pathlib import Path

import pytest

from camex_ft.results import provenance
from camex_ft.results.provenance import (
    PACKAGES,
    command_line,
    environment,
    host_kind,
    source_state,
    strip_paths,
    versions,
)

ROOT = Path(__file__).resolve().parents[2]


def test_packages_are_the_core_dependencies():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [
        line
        for line in setup["options"]["install_requires"].splitlines()
        if line and not line.startswith("#")
    ]
    assert sorted(PACKAGES) == sorted(re.split(r"[ <>=]", line)[0] for line in lines)


def test_versions_are_the_installed_ones():
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == importlib.metadata.version("torch")
    assert set(found) >= set(PACKAGES)


def test_nothing_of_the_machine_is_named():
    text = environment().model_dump_json()
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text
    assert str(ROOT) not in text


def test_host_kind():
    assert re.fullmatch(r"cpu-\d+", host_kind())
    assert host_kind(["NVIDIA H100 80GB HBM3"] * 2) == "cuda-nvidia-h100-80gb-hbm3-x2"


@pytest.fixture
def checkout(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "camex_ft").mkdir()
    (tmp_path / "camex_ft" / "__init__.py").write_text("")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    return tmp_path


def test_commit_and_dirt(checkout):
    commit, dirty = source_state(checkout)
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert dirty is False
    (checkout / "results").mkdir()
    (checkout / "results" / "new").write_text("")
    assert source_state(checkout) == (commit, False)
    (checkout / "camex_ft" / "new.py").write_text("")
    assert source_state(checkout) == (commit, True)


def test_a_package_inside_a_foreign_repository_has_no_commit(checkout):
    installed = checkout / "venv"
    (installed / "camex_ft").mkdir(parents=True)
    (installed / "camex_ft" / "__init__.py").write_text("")
    assert source_state(installed) == (None, None)


def test_no_commit_outside_git_or_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert source_state(tmp_path) == (None, None)
    monkeypatch.setenv("PATH", "")
    assert source_state(ROOT) == (None, None)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/home/ann/models/mine", "mine"),
        ("/home/ann/models/", "models"),
        ("data.dir=/home/ann/glue x=1", "data.dir=glue x=1"),
        ("['/a/b', \"/c/d\"]", "['b', \"d\"]"),
        ("~/models/mine", "mine"),
        ("nyu-mll/glue", "nyu-mll/glue"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("3/4 and / alone", "3/4 and / alone"),
        ("../shared/data", "../shared/data"),
        ("configs/glue.yaml", "configs/glue.yaml"),
    ],
)
def test_absolute_paths_are_cut_and_nothing_else(text, clean):
    assert strip_paths(text) == clean


def test_paths_below_the_working_directory_stay_usable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert strip_paths(f"{tmp_path}/configs/a.yaml") == "configs/a.yaml"
    assert strip_paths(tmp_path / "configs") == "configs"


def test_nested_values_are_cleaned_and_keep_their_shape():
    assert strip_paths({"a": ["/x/y", {"b": (Path("/x/z"), 1, None)}]}) == {"a": ["y", {"b": ("z", 1, None)}]}


def test_command_line_is_quoted_and_clean():
    argv = [os.path.join(os.sep, "opt", "bin", "camex-ft"), "run", "/home/ann/my.yaml", "task.name=a b"]
    assert command_line(argv) == "camex-ft run my.yaml 'task.name=a b'"


def test_the_package_run_as_a_module_goes_by_its_command():
    assert command_line(["/somewhere/camex_ft/__main__.py", "run", "glue"]) == "camex-ft run glue"


def test_command_line_defaults_to_this_process(monkeypatch):
    monkeypatch.setattr(provenance.sys, "argv", ["/x/camex-ft", "doctor"])
    assert command_line() == "camex-ft doctor"


def test_a_launched_process_goes_by_what_was_typed(monkeypatch):
    monkeypatch.setenv(provenance.COMMAND, "camex-ft run glue --gpus 2")
    assert command_line() == "camex-ft run glue --gpus 2"
    assert command_line(["camex-ft", "doctor"]) == "camex-ft doctor"
