"""Which run folder is that of an experiment, and what has changed since a run of the same settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from camex_ft.config import Config, config_hash, to_yaml
from camex_ft.config.identity import hash_by_name
from camex_ft.results import run_folder, run_name
from camex_ft.results.record import Record
from tests.helpers.synthetic_results import PLAIN

DATA, BACKBONE, OTHER = "a" * 64, "b" * 64, "c" * 64
METRICS = {"primary": "accuracy", "best": 1, "best_epoch": 1, "last": 1, "per_epoch": [], "all": {}}


def settled(output: Path, backbone: str = "/models/hf", **sections: Any) -> Config:
    values = {"profile": "embedded", "backbone": backbone, "output": {"dir": str(output)}, **sections}
    return Config.model_validate(values)


def name_of(config: Config, hash8: str) -> str:
    task, seed = config.task, config.training.seed
    return run_name(
        suite=task.suite, task=task.name, backbone=config.backbone, protocol="ties-ca", seed=seed, hash8=hash8
    )


def new_name(config: Config, data: str = DATA, backbone: str = BACKBONE) -> str:
    return name_of(config, config_hash(config, data=data, backbone=backbone))


def finish(config: Config, *, data: str = DATA, backbone: str | None = BACKBONE) -> Record:
    """Leave the record of a finished run; without a backbone's content, that of an earlier version."""
    by_name = name_of(config, hash_by_name(config, data=data))
    name = by_name if backbone is None else new_name(config, data, backbone)
    tree = {
        **PLAIN,
        "metrics": METRICS,
        "task": config.task.id,
        "protocol": "ties-ca",
        "seed": config.training.seed,
    }
    tree["run"] = {**PLAIN["run"], "name": name}
    tree["data"] = {**PLAIN["data"], "sha256": data}
    tree["model"] = {**PLAIN["model"], "backbone_sha256": backbone}
    folder = config.output.path / "runs" / name
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(tree))
    return Record.model_validate(tree)


def interrupt(config: Config, name: str) -> Path:
    folder = config.output.path / "runs" / name
    checkpoint = folder / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    return checkpoint


def changes(config: Config, data: str = DATA, backbone: str = BACKBONE) -> list[str]:
    found = run_folder.changes(config, new_name(config, data, backbone), data=data, backbone=backbone)
    return list(found)


def test_a_folder_is_found_under_another_label(tmp_path: Path) -> None:
    here, there = settled(tmp_path), settled(tmp_path, "elsewhere/copy")
    assert run_folder.find_folder(tmp_path, new_name(here)) is None
    record = finish(there)
    assert run_folder.find_folder(tmp_path, new_name(here)) == record.run.name != new_name(here)
    interrupt(here, new_name(here))  # a finished one comes first
    assert run_folder.find_folder(tmp_path, new_name(here)) == record.run.name


@pytest.mark.parametrize("section", [{"training": {"seed": 1}}, {"task": {"name": "rte"}}])
def test_a_folder_of_another_experiment_is_not_found(tmp_path: Path, section: dict[str, Any]) -> None:
    finish(settled(tmp_path, **section))
    assert run_folder.find_folder(tmp_path, new_name(settled(tmp_path))) is None


def test_a_record_has_settings_whatever_its_data_and_content(tmp_path: Path) -> None:
    config = settled(tmp_path)
    for record in (finish(config), finish(config, data=OTHER, backbone=OTHER), finish(config, backbone=None)):
        assert run_folder.has_settings(record, config)
        assert not run_folder.has_settings(record, settled(tmp_path, merging={"experts": 3}))


def test_what_has_changed_is_said(tmp_path: Path) -> None:
    config = settled(tmp_path)
    name = finish(config).run.name
    assert changes(config) == []
    (line,) = changes(config, backbone=OTHER)
    assert line == (
        f"{name} has the same settings, but the backbone changed since (SHA-256 bbbbbbbbbbbb then, cccccccccccc now): "
        "running again"
    )
    (line,) = changes(config, data=OTHER, backbone=OTHER)
    assert (
        "the data changed since (SHA-256 aaaaaaaaaaaa then, cccccccccccc now) and the backbone changed"
        in line
    )
    assert changes(settled(tmp_path, merging={"experts": 3}), backbone=OTHER) == []


def test_a_record_without_the_content_is_said(tmp_path: Path) -> None:
    config = settled(tmp_path)
    name = finish(config, backbone=None).run.name
    (line,) = changes(config)
    assert line.startswith(
        f"{name} has the same settings, but its record does not say which content the backbone had"
    )


def test_an_interrupted_run_of_other_content_is_said(tmp_path: Path) -> None:
    config = settled(tmp_path)
    name = new_name(config, backbone=OTHER)
    interrupt(config, name)
    (line,) = changes(config)
    assert line.startswith(
        f"{name} was interrupted. It has the same settings but other data or another backbone"
    )
    assert changes(config, backbone=OTHER) == []
    assert changes(settled(tmp_path, merging={"experts": 3})) == []


def test_a_folder_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    config = settled(tmp_path)
    for hash8, text in (("00000000", "{"), ("11111111", "")):
        checkpoint = interrupt(config, name_of(config, hash8))
        (checkpoint.parents[1] / "config.yaml").write_text(text)
    (tmp_path / "runs" / name_of(config, "22222222")).write_text("a file")
    assert changes(config) == []


def test_a_checkpoint_tells_whether_it_is_of_other_content(tmp_path: Path) -> None:
    config = settled(tmp_path)
    checkpoint = interrupt(config, new_name(config))
    assert not run_folder.differs(checkpoint, data=DATA, backbone=BACKBONE)
    assert run_folder.differs(checkpoint, data=OTHER, backbone=BACKBONE)
    assert run_folder.differs(checkpoint, data=DATA, backbone=OTHER)
    old = interrupt(config, name_of(config, hash_by_name(config, data=DATA)))
    assert not run_folder.differs(old, data=DATA, backbone=OTHER)  # its content is not known
    alone = tmp_path / "checkpoint-2"
    alone.mkdir()
    assert not run_folder.differs(alone, data=DATA, backbone=BACKBONE)


@pytest.mark.parametrize("content", [None, OTHER, BACKBONE])
def test_an_earlier_folder_may_be_that_of_a_backbone_unless_its_record_says_another(
    tmp_path: Path, content: str | None
) -> None:
    record = finish(settled(tmp_path, "org/name"), backbone=content)
    folder = tmp_path / "runs" / record.run.name
    assert run_folder.may_be_of(folder, BACKBONE) == (content != OTHER)
    assert not run_folder.may_be_of(tmp_path / "nothing", BACKBONE)
