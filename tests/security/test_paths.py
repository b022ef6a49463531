"""Hostile names in a configuration name nothing outside the folder of results, and no two things the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given

from camex_ft.config.backbones import in_package
from camex_ft.config.shipped import ROOT, copy_config, find_config
from camex_ft.results.run_folder import run_name
from camex_ft.utils.errors import UserError
from tests.helpers.hostile import names


@given(names, names, names, names)
@example("..", "..", "..", "..")
def test_a_run_has_one_folder_below_runs(suite: str, task: str, backbone: str, protocol: str) -> None:
    name = run_name(suite=suite, task=task, backbone=backbone, protocol=protocol, seed=1, hash8="01234567")
    base = os.path.join(os.sep, "results", "runs")
    assert os.path.dirname(os.path.normpath(os.path.join(base, name))) == base
    assert name.isascii() and all(char.isalnum() or char in "._-" for char in name)
    assert len(name) <= 240  # of the 255 bytes that file systems take


@given(names)
def test_a_package_backbone_stays_in_its_package(inside: str) -> None:
    """`json` is a package without models: whatever is named, nothing outside it is found."""
    with pytest.raises(UserError):
        in_package(f"package:json/{inside}")


@given(names)
def test_a_shipped_configuration_is_one_of_ours(name: str) -> None:
    """What is found without being the user's own path lies in `configs`."""
    found = find_config(name)
    if not os.path.exists(name) and os.path.isfile(found):
        assert found.resolve().is_relative_to(ROOT)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "../setup", "accelerate/ddp", "", "."])
def test_only_configurations_are_copied(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no configuration"):
        copy_config(name, tmp_path)
    assert not list(tmp_path.iterdir())
