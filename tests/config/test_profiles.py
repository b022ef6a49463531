"""Profiles: what lies under what, which one `auto` is, and what is missing for it, before any work is done."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from camex_ft.config import Config, ConfigErrors, load_config, resolve
from camex_ft.utils.errors import UserError
from tests.helpers.config_trees import KEYS, leaves, tree

T5, GLUE = "google-t5/t5-base", "nyu-mll/glue:sst2"
files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)


def lacks(config: Config, environment) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        resolve(config, environment)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("cuda", "hub", "cached", "profile", "why"),
    [
        (True, True, (), "paper", "CUDA and all that it needs are there"),
        (True, False, (T5, GLUE), "paper", "CUDA and all that it needs are there"),
        (True, False, (T5,), "embedded", "its cache lacks the data set nyu-mll/glue (sst2)"),
        (True, False, (GLUE,), "embedded", f"its cache lacks the backbone {T5}"),
        (True, False, (), "embedded", f"its cache lacks the backbone {T5} and the data set"),
        (False, True, (T5, GLUE), "embedded", "there is no CUDA device"),
        (False, False, (), "embedded", "there is no CUDA device"),
    ],
)
def test_what_auto_picks_and_why(machine, cuda, hub, cached, profile, why):
    config, reason = resolve(Config(), machine(cuda=cuda, hub=hub, cached=cached))
    assert config.profile == profile
    assert reason.startswith(f"profile {profile}: ")
    assert why in reason


def test_the_paper_profile_is_the_published_recipe(machine):
    config, _ = resolve(Config(), machine(cuda=True, hub=True))
    assert (config.backbone, config.data.source) == (T5, "hub")
    assert (config.merging.experts, config.merging.k, config.merging.curvature.rank) == (7, 7, 8)
    training = config.training
    assert (training.learning_rate, training.num_train_epochs, training.seed) == (2e-4, 5, 42)
    assert (training.per_device_train_batch_size, training.weight_decay) == (16, 0)
    assert config.task.max_length == 128


@pytest.mark.parametrize("suite", ["glue", "superglue"])
def test_the_embedded_profile_needs_nothing(machine, suite):
    task = {"suite": suite, "name": "rte"}
    config, _ = resolve(Config.model_validate({"profile": "embedded", "task": task}), machine())
    assert config.backbone.startswith("embedded/")
    assert config.data.source == "embedded"


@files
@given(leaves(), st.sampled_from([(True, True), (False, False)]))
def test_a_key_that_is_set_wins_over_the_profile(machine, values, there):
    values = {
        key: value for key, value in values.items() if key not in (("profile",), ("training", "resume"))
    }
    values = {key: value for key, value in values.items() if key[0] not in ("output", "merging")}
    resolved, _ = resolve(Config.model_validate(tree(values)), machine(cuda=there[0], hub=there[1]))
    found, expected = resolved.model_dump(), Config.model_validate(tree(values)).model_dump()
    for key in values:
        left, right = found, expected
        for part in key:
            left, right = left[part], right[part]
        assert left == right, key


@pytest.mark.parametrize(
    "key", sorted(set(KEYS) & {("merging", "experts"), ("task", "max_length"), ("training", "seed")})
)
def test_a_key_set_to_its_default_wins_over_the_profile(machine, key):
    default = Config().model_dump()
    for part in key:
        default = default[part]
    resolved = resolve(Config.model_validate(tree({key: default})), machine())[0].model_dump()
    for part in key:
        resolved = resolved[part]
    assert resolved == default


def test_extends_lies_between_the_profile_and_the_file(write, machine):
    write("merging: {experts: 5}\ntask: {max_length: 33}\n", "base.yaml")
    config = load_config(write("extends: base.yaml\ntask: {max_length: 44}\n"), ["data.seed=7"])
    resolved, _ = resolve(config, machine())
    assert resolved.merging.experts == 5  # base.yaml, over the profile's 4
    assert resolved.task.max_length == 44  # the file, over base.yaml
    assert resolved.merging.curvature.rank == 2  # the profile, over the default 8
    assert resolved.data.seed == 7


def test_resolving_twice_changes_nothing(machine):
    once, _ = resolve(Config(), machine())
    assert once == resolve(once, machine())[0]
    assert once.merging.options == {"density": 1.0}  # the protocol's defaults are written out


def test_what_is_embedded_makes_the_profile_embedded(machine):
    here = machine(cuda=True, hub=True)
    for values, what in (
        ({"backbone": "embedded/bert"}, "backbone"),
        ({"data": {"source": "embedded"}}, "data.source"),
    ):
        config, reason = resolve(Config.model_validate(values), here)
        assert (config.profile, reason) == ("embedded", f"profile embedded: {what} is embedded")


def test_a_data_folder_is_disk_under_both_profiles(folder, machine):
    config = Config.model_validate({"data": {"dir": str(folder)}})
    for here in (machine(), machine(cuda=True, cached=(T5,))):
        assert resolve(config, here)[0].data.source == "disk"
    assert resolve(config, machine(cuda=True, cached=(T5,)))[0].profile == "paper"


@pytest.mark.parametrize(
    ("cached", "missing"),
    [
        ((), "the backbone google-t5/t5-base and the data set nyu-mll/glue (sst2)"),
        ((T5,), "the data set nyu-mll/glue (sst2)"),
        ((GLUE,), "the backbone google-t5/t5-base"),
    ],
)
def test_paper_without_what_it_needs_names_it_and_the_three_ways(write, machine, cached, missing):
    config = load_config(write("task: {name: sst2}\nprofile: paper\n"))
    (said,) = lacks(config, machine(cuda=True, cached=cached))
    assert said.startswith(f"run.yaml:2: profile: the run needs {missing}; ")
    for way in (
        "(1) the hub cache",
        "hf download google-t5/t5-base",
        "(2) data.dir=FOLDER",
        "(3) backbone=FOLDER",
    ):
        assert way in said
    assert "profile=embedded, which needs nothing" in said


def test_paper_takes_a_local_backbone_and_data_instead(folder, machine):
    (folder / "model").mkdir()
    (folder / "data").mkdir()
    config = Config.model_validate({"profile": "paper", "backbone": "./model", "data": {"dir": "data"}})
    assert "on the CPU" in resolve(config, machine())[1]


def test_a_hub_backbone_without_a_network_is_reported_under_any_profile(write, machine):
    config = load_config(write("profile: embedded\nbackbone: google-t5/t5-base\n"))
    (said,) = lacks(config, machine())
    assert said.startswith("run.yaml:2: backbone: the run needs the backbone google-t5/t5-base; ")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"backbone": "./nowhere"}, "backbone: there is no folder './nowhere'"),
        ({"backbone": "/nowhere/at/all"}, "backbone: there is no folder '/nowhere/at/all'"),
        ({"backbone": "./mode"}, "Did you mean 'model'?"),
        (
            {"backbone": "package:no_such_package_here/model"},
            "there is no installed package 'no_such_package_here'",
        ),
        ({"backbone": "package:"}, "expected package:NAME/PATH"),
        ({"backbone": "t5 base"}, "backbone: 't5 base' is neither a folder nor a hub id"),
        ({"backbone": "bert"}, "For the package's own, write backbone=embedded/bert."),
        ({"backbone": "~nobody-here/model"}, "backbone: there is no folder '~nobody-here/model'"),
        ({"backbone": "./" + "a" * 300}, "backbone: there is no folder './aaa"),
        ({"data": {"dir": "a" * 300}}, "data.dir: there is no folder 'aaa"),
        ({"data": {"dir": "dta"}}, "data.dir: there is no folder 'dta'. Did you mean 'data'?"),
        ({"data": {"dir": "file"}}, "data.dir: expected a folder, and 'file' is a file"),
        ({"training": {"resume": "atuo"}}, "training.resume: expected auto, never or a checkpoint's folder"),
        ({"training": {"resume": "atuo"}}, "Did you mean 'auto'?"),
        ({"output": {"dir": "file"}}, "output.dir: expected a folder, and 'file' is a file"),
        ({"output": {"dir": "file/results"}}, "output.dir: expected a folder, and 'file' is a file"),
    ],
)
def test_what_is_not_on_this_machine(folder, machine, values, expected):
    (folder / "model").mkdir()
    (folder / "data").mkdir()
    (folder / "file").touch()
    (said,) = lacks(Config.model_validate({"profile": "embedded", **values}), machine())
    assert expected in said


@pytest.mark.parametrize(
    ("key", "path", "expected"),
    [
        ("data", "closed", "data.dir: the folder 'closed' cannot be read: check its permissions"),
        ("output", "closed", "output.dir: 'closed' cannot be written: no permission in 'closed'"),
        ("output", "closed/a/b", "output.dir: 'closed/a/b' cannot be written: no permission in 'closed'"),
    ],
)
def test_a_folder_without_permission(folder, machine, monkeypatch, key, path, expected):
    """The system is asked in our place: tests may run as the superuser, who may do anything."""
    (folder / "closed").mkdir()
    monkeypatch.setattr("camex_ft.config.needs.os.access", lambda path, mode: Path(path).name != "closed")
    assert lacks(Config.model_validate({"profile": "embedded", key: {"dir": path}}), machine()) == [expected]


def test_a_local_backbone_is_found_from_the_home_folder(folder, machine, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    Path("model").mkdir()
    resolve(Config.model_validate({"profile": "embedded", "backbone": "~/model"}), machine())


def test_a_rule_that_only_the_profile_breaks_names_the_profile(write, machine):
    config = load_config(write("merging:\n  top_k: 6\n"))  # fine with the paper's 7 experts
    (said,) = lacks(config, machine())
    assert (
        said
        == "run.yaml:2: merging.top_k: expected at most merging.experts, which is 4, got 6 (profile embedded)"
    )
    resolve(config, machine(cuda=True, hub=True))


def test_everything_that_is_missing_is_reported_together(machine, folder):
    values = {"profile": "embedded", "backbone": "./a", "data": {"dir": "b"}, "training": {"resume": "c"}}
    assert len(lacks(Config.model_validate(values), machine())) == 3


def test_the_hub_is_not_asked_where_nothing_is_needed_from_it(machine):
    def asked() -> bool:
        raise AssertionError("asked")

    from camex_ft.config import Environment

    nobody = Environment(cuda=asked, hub=asked, model=lambda name: asked(), data=lambda name, part: asked())
    assert resolve(Config(profile="embedded"), nobody)[0].backbone == "embedded/t5"


def test_a_configuration_made_in_code_is_checked_too(machine):
    with pytest.raises(
        UserError, match=r"merging\.top_k: expected at most merging\.experts, which is 4, got 9"
    ):
        resolve(Config.model_validate({"profile": "embedded", "merging": {"top_k": 9}}), machine())


def test_a_folder_that_takes_no_files_is_found_before_any_work(folder, machine, monkeypatch):
    """As one of a file system that is read-only or full, whatever the permissions say."""

    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("camex_ft.config.needs.tempfile.TemporaryFile", refuse)
    (said,) = lacks(Config.model_validate({"profile": "embedded", "output": {"dir": "r"}}), machine())
    assert said == "output.dir: 'r' cannot be written: Read-only file system in '.'"
    monkeypatch.undo()
    (folder / "r").mkdir()
    (folder / "r" / "runs").write_text("a file")
    monkeypatch.chdir(folder)
    (said,) = lacks(Config.model_validate({"profile": "embedded", "output": {"dir": "r"}}), machine())
    assert said == "output.dir: 'r' cannot be written: expected a folder, and 'r/runs' is a file"
