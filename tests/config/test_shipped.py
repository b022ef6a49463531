"""Every configuration that comes with the package: it validates, resolves on any machine, and can be copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from camex_ft.config import config_hash, copy_config, list_configs, load_config, notes, resolve, summary
from camex_ft.config.shipped import list_merges, list_specifications, list_studies
from camex_ft.utils import registry
from camex_ft.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2] / "configs"
CONFIGS = list_configs()


def test_all_files_are_listed():
    listed = [*CONFIGS, *list_specifications(), *list_merges(), *list_studies()]
    there = set(ROOT.rglob("*.yaml")) - set(ROOT.glob("accelerate/*.yaml"))  # those are accelerate's own
    assert {each.path.resolve() for each in listed} == there
    assert len(listed) == len(there)
    assert [config.name for config in CONFIGS][:4] == ["glue", "lm", "qa", "superglue"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_each_validates_and_resolves(config, machine):
    written = load_config(config.path)
    assert notes(written) == []
    if written.backbone.startswith("package:"):
        pytest.importorskip(written.backbone[8:].partition("/")[0], reason="needs the weights: make weights")
    for here in (machine(hub=True), machine(cuda=True, hub=True)):
        resolved, reason = resolve(written, here)
        assert resolved.profile in reason
        assert summary(resolved)["task"].startswith(resolved.task.id)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_the_header_says_what_it_is_and_how_to_run_it(config):
    first, second = config.path.read_text(encoding="utf-8").splitlines()[:2]
    assert first == f"# {config.summary}"
    assert first.endswith(".")
    words = second.removeprefix("# Run: ").split()
    assert words[:3] == ["camex-ft", "run", f"configs/{config.name}.yaml"]
    load_config(config.path, words[3:])  # the command itself is right


def test_there_is_one_for_every_protocol_and_embedded_backbone():
    names = {config.name for config in CONFIGS}
    assert {f"protocols/{name}" for name in registry.PROTOCOLS.names()} <= names
    assert {f"backbones/embedded-{name}" for name in registry.EMBEDDED.names()} <= names


@pytest.mark.parametrize("name", registry.PROTOCOLS.names())
def test_a_protocol_file_runs_its_protocol_with_its_own_defaults(name, machine):
    """The numbers written in it to be changed are the defaults."""
    resolved, _ = resolve(load_config(f"protocols/{name}"), machine())
    plain, _ = resolve(load_config("glue", [f"merging.protocol={name}"]), machine())
    assert resolved.merging.protocol == name
    if resolved.merging.top_k is None:
        assert config_hash(resolved) == config_hash(plain)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_copy_says_the_same(folder, config):
    target = copy_config(config.name, "my.yaml")
    assert load_config(target) == load_config(config.path)


def test_copies_go_to_files_and_folders_and_never_over_a_file(folder):
    assert copy_config("protocols/ties", ".") == Path("ties.yaml")
    assert copy_config("configs/protocols/ties.yaml", "other.yaml") == Path("other.yaml")
    Path("other.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"other\.yaml exists already"):
        copy_config("glue", "other.yaml")
    assert Path("other.yaml").read_text() == "mine"
    with pytest.raises(
        UserError, match=r"there is no configuration 'protocols/tise'. Did you mean 'protocols/ties'\?"
    ):
        copy_config("protocols/tise", "x.yaml")
    with pytest.raises(UserError, match=r"nowhere/x.yaml cannot be written"):
        copy_config("glue", "nowhere/x.yaml")
    assert not Path("x.yaml").exists()


@pytest.mark.parametrize("name", ["../setup", "../../etc/passwd", "protocols", ""])
def test_only_configurations_are_copied(folder, name):
    with pytest.raises(UserError):
        copy_config(name, "x.yaml")
