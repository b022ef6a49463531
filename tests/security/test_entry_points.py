"""Whatever opens the folder of a model or a checkpoint looks at it first: refused, or passed over with the reason."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from camex_ft import upcycling
from camex_ft.backbones import loading as backbones
from camex_ft.backbones import source
from camex_ft.config import load_config, resolve, to_yaml
from camex_ft.exporting.export import export
from camex_ft.exporting.pushing import upload_of
from camex_ft.run import inference
from camex_ft.training import checkpoint_folder
from camex_ft.training.checkpoint_folder import MANIFEST, write_manifest
from camex_ft.utils import folders
from camex_ft.utils.errors import UserError, guard
from tests.helpers.hostile import within
from tests.helpers.hostile_folders import REFUSED, config, link, loot, pickled
from tests.helpers.synthetic_results import result

STORED = Path(__file__).parents[1] / "stored" / "0.1.0"
Open = Callable[[Path], object]


def run_of(model: Path) -> Path:
    """A run folder whose model this is."""
    run = model.parent / "run"
    run.mkdir()
    settled, _ = resolve(
        load_config("glue", ["profile=embedded", "backbone=embedded/bert", "merging.experts=2"])
    )
    (run / "config.yaml").write_text(to_yaml(settled))
    record = result(task="glue/sst2", protocol="ties-ca", seed=42, scores=[0.5], old=True).record
    (run / "record.json").write_text(record.to_json())
    model.rename(run / "model")
    shutil.copy(model.parent / "elsewhere", run)
    return run


def checkpoint_of(model: Path) -> Path:
    """A run's folder of checkpoints that holds one with this model's files, and a manifest that says so."""
    made = model.parent / "checkpoints" / "checkpoint-1"
    made.parent.mkdir()
    shutil.copy(model.parent / "elsewhere", made.parent)
    shutil.copytree(model, made, symlinks=True, copy_function=copy)
    (made / "state").mkdir()
    for name in checkpoint_folder.NEEDED[1:]:
        (made / name).write_text("{}")
    (made / checkpoint_folder.STATE).write_text(json.dumps({"global_step": 1}))
    if not any(path.is_fifo() or path.is_socket() for path in made.iterdir()):
        with contextlib.suppress(OSError):  # nothing to be read behind a link
            write_manifest(made)
    return made.parent


def copy(source: str, target: str) -> None:
    if Path(source).is_fifo() or Path(source).is_socket():
        os.mkfifo(target)
    elif os.lstat(source).st_nlink > 1:
        os.link(source, target)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


def newest(model: Path) -> None:
    """Going on with a run: what is passed over is said, here as an error."""
    found, said = checkpoint_folder.newest(checkpoint_of(model))
    assert found is None
    raise UserError(" ".join(said))


def adapter(model: Path) -> None:
    """An adapter on this backbone."""
    upcycling.load(STORED / "adapter", backbone=str(model))


OPEN: dict[str, Open] = {
    "source.check": lambda model: source.check(str(model)),
    "backbones.load": lambda model: backbones.load(str(model), head="base"),
    "upcycling.load": upcycling.load,
    "the backbone of an adapter": adapter,
    "evaluate": lambda model: inference.evaluate(run_of(model)),
    "load_trained": lambda model: inference.load_trained(run_of(model)),
    "export": lambda model: export(run_of(model), model.parent / "out"),
    "push": lambda model: upload_of(model, "somebody/model"),
    "push of a run": lambda model: upload_of(run_of(model), "somebody/model"),
    "checkpoints": newest,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model of ours, with a file as tokenizers have."""
    made = tmp_path / "model"
    shutil.copytree(STORED / "bert", made)
    (made / "outputs.safetensors").unlink()
    (made / "vocab.txt").write_text("[PAD]\n")
    (tmp_path / "elsewhere").write_bytes((made / "model.safetensors").read_bytes())
    return made


# One of each sort at every place; all of them at two places, the others when slow.
SORTS = ("link out", "weights elsewhere", "pipe", "pickle", "index up", "code")
EVERYWHERE = ("source.check", "upcycling.load")
PAIRS = [
    (where, name)
    if name in SORTS or where in EVERYWHERE
    else pytest.param(where, name, marks=pytest.mark.slow)
    for where in OPEN
    for name in REFUSED
]


@pytest.mark.parametrize(("where", "name"), PAIRS)
def test_a_hostile_folder_is_not_opened(where: str, name: str, folder: Path, capsys: Any) -> None:
    change, message = REFUSED[name]
    change(folder)
    with within(20):
        code = guard(lambda: OPEN[where](folder))
    said = capsys.readouterr().err
    assert code == 2, said
    own = {"pickle": "it has no weights", "pickle beside other tensors": "a pickle, which no run writes"}
    expected = own.get(name, message) if where == "checkpoints" else message
    assert expected in said, said
    assert not loot(folder).exists() and not (folder / "loot").exists()


def test_the_folder_itself_is_opened(folder: Path) -> None:
    """Nothing above is refused for another reason."""
    assert folders.unsafe(folder) is None
    upcycling.load(folder)
    assert upload_of(folder, "somebody/model").files
    found, said = checkpoint_folder.newest(checkpoint_of(folder))
    assert found is not None, said
    assert upcycling.expert_layers(inference.load_trained(run_of(folder))[0])


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def nested(path: Path) -> None:
    path.write_text("[" * 100_000 + "]" * 100_000)


def only_pickled(adapter: Path) -> None:
    pickled(adapter)
    (adapter / "adapter.safetensors").unlink()


ADAPTERS: dict[str, Open] = {
    "weights elsewhere": link("adapter.safetensors", "../elsewhere"),
    "link out": link("adapter.json", "/etc/hostname"),
    "pipe": lambda adapter: pipe(adapter / "adapter.json"),
    "not text": lambda adapter: (adapter / "adapter.json").write_bytes(b"\xff\xfe\0"),
    "a list": lambda adapter: (adapter / "adapter.json").write_text("[]"),
    "pickle": only_pickled,
    "code": config(auto_map={"AutoModel": "evil.Model"}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_hostile_adapter_is_not_opened(name: str, tmp_path: Path) -> None:
    made = tmp_path / "adapter"
    shutil.copytree(STORED / "adapter", made)
    (tmp_path / "elsewhere").write_bytes((made / "adapter.safetensors").read_bytes())
    (made / "model.safetensors").write_bytes(b"")  # for `pickled`, which removes it
    ADAPTERS[name](made)
    with within(20):
        assert guard(lambda: upcycling.load(made, backbone=upcycling.load(made / "backbone"))) == 2
    assert not loot(made).exists()


RUNS: dict[str, Open] = {
    f"{name}: {what}": lambda run, name=name, change=change: change(run / name)  # type: ignore[misc]
    for name in ("record.json", "config.yaml")
    for what, change in {
        "pipe": pipe,
        "nested": nested,
        "not text": lambda path: path.write_bytes(b"\xff\xfe\0"),
        "folder": lambda path: (path.unlink(), path.mkdir()),
        "number": lambda path: path.write_text("3"),
    }.items()
}


@pytest.mark.parametrize("name", RUNS)
def test_a_hostile_run_is_not_opened(name: str, folder: Path) -> None:
    run = run_of(folder)
    RUNS[name](run)
    with within(5):
        assert guard(lambda: inference.read_run(run)) == 2


def listed(content: Any) -> Open:
    return lambda made: (made / MANIFEST).write_text(json.dumps(content))


def state(text: str) -> Open:
    """Another state, and a manifest that fits it."""
    return lambda made: ((made / checkpoint_folder.STATE).write_text(text), write_manifest(made))


CHECKPOINTS: dict[str, Open] = {
    "manifest nested": lambda made: nested(made / MANIFEST),
    "manifest of numbers": listed({"format": 1, "files": {"config.json": 3}}),
    "manifest of lists": listed({"format": 1, "files": {"config.json": {"size": [], "sha256": {}}}}),
    "versions of a list": listed({"format": 99, "files": {}, "versions": []}),
    "format of a truth value": listed({"format": True, "files": {}}),
    "names elsewhere": listed({"format": 1, "files": {"../../elsewhere": {"size": 1, "sha256": ""}}}),
    "state is a list": state("[]"),
    "state is no JSON": state("{"),
    "state of other fields": state('{"evil": 1}'),
    "state nested": state("[" * 100_000),
    "best one elsewhere": state('{"global_step": 1, "best_model_checkpoint": ".."}'),
    "best one is a number": state('{"global_step": 1, "best_model_checkpoint": 3}'),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_hostile_checkpoint_is_passed_over(name: str, folder: Path) -> None:
    made = checkpoint_of(folder)
    CHECKPOINTS[name](made / "checkpoint-1")
    with within(5):
        found, said = checkpoint_folder.newest(made)
    assert found is None and len(said) == 1 and "is passed over: " in said[0]
