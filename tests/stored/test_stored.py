"""What an earlier version of the package saved is loaded by this one, and gives the outputs that it gave then."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from camex_ft.backbones import family_for
from camex_ft.backbones.heads import HEADS
from camex_ft.upcycling import expert_layers, load
from camex_ft.utils.registry import BACKBONES

HERE = Path(__file__).parent
FOLDERS = sorted(path.parent for path in HERE.glob("*/*/outputs.safetensors"))
LARGEST, ALL = 60_000, 500_000  # bytes: they are in the repository for good


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("stored_write", HERE / "write.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WRITE = _script()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_saved_computes_what_it_computed(folder: Path) -> None:
    tensors = load_file(folder / WRITE.OUTPUTS)
    inputs = {name.removeprefix("in."): tensor for name, tensor in tensors.items() if name.startswith("in.")}
    backbone = folder / WRITE.BACKBONE
    model = load(folder, backbone=load(backbone) if backbone.is_dir() else None)
    assert expert_layers(model) and model.dtype == torch.float32 and not model.training
    assert type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    # Computed in float64 then and now; norms and softmaxes, which transformers computes in float32 whatever comes in,
    # may be rounded otherwise by another processor or version of torch.
    torch.testing.assert_close(WRITE.output(model, inputs), tensors["out"], rtol=1e-6, atol=1e-6)


def test_outputs_tell_models_apart() -> None:
    """A test that compared nothing would pass, too: outputs are not small, and rows and positions differ."""
    for folder in FOLDERS:
        out = load_file(folder / WRITE.OUTPUTS)["out"]
        assert out.abs().max() > 0.1 and out.flatten().unique().numel() > out.numel() / 2, folder.name


def test_every_family_has_one_and_so_has_every_form() -> None:
    saved = [json.loads((folder / "config.json").read_text()) for folder in FOLDERS]
    families = {family_for(config["model_type"]).name for config in saved}
    assert families >= set(BACKBONES.names()), "run python tests/stored/write.py"
    from camex_ft.utils.registry import PROTOCOLS

    protocols = [PROTOCOLS.get(config["camex"]["merging"]["protocol"]) for config in saved]
    assert {protocol.form for protocol in protocols} == {"weights", "outputs", "dynamic"}
    assert {protocol.curvature for protocol in protocols} == {True, False}
    kinds = {config["camex"]["merging"]["curvature"]["kind"] for config in saved}
    assert kinds == {"kronecker", "diagonal", "low-rank"}
    assert any((folder / "adapter.json").is_file() for folder in FOLDERS)
    assert all(config["camex"]["versions"]["camex_ft"] for config in saved)


def test_the_auto_class_reads_them_too() -> None:
    folder = next(folder for folder in FOLDERS if folder.name == "t5")
    tensors = load_file(folder / WRITE.OUTPUTS)
    inputs = {name.removeprefix("in."): tensor for name, tensor in tensors.items() if name.startswith("in.")}
    model = HEADS["seq2seq-lm"].from_pretrained(folder)
    torch.testing.assert_close(WRITE.output(model, inputs), tensors["out"], rtol=1e-6, atol=1e-6)


def test_they_are_small() -> None:
    sizes = {
        folder.name: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) for folder in FOLDERS
    }
    assert max(sizes.values()) < LARGEST and sum(sizes.values()) < ALL, sizes
