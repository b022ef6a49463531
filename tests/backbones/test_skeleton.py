"""Backbones without weights: of every form of `backbone:` the model that `load` returns, tensor by tensor."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from camex_ft import synthetic
from camex_ft.backbones import source
from camex_ft.backbones.loading import load, skeleton
from camex_ft.utils import registry
from camex_ft.utils.errors import UserError


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", registry.EMBEDDED.names())
def test_embedded(family: str) -> None:
    for head in registry.EMBEDDED.get(family).heads:
        if head in ("base", "sequence-classification", "causal-lm", "seq2seq-lm"):
            made = skeleton(f"embedded/{family}", head=head)
            assert shapes(made) == shapes(synthetic.backbone(family, head=head)[0])
            assert all(p.is_meta for p in made.parameters())


def test_a_folder_with_its_labels(tmp_path: Path) -> None:
    model, tokenizer = synthetic.backbone("bert")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    names = ("a", "b", "c")
    whole, _ = load(str(tmp_path), label_names=names)
    (tmp_path / "model.safetensors").unlink()
    for spec in (str(tmp_path), f"new:{tmp_path}"):
        assert shapes(skeleton(spec, label_names=names)) == shapes(whole)
    with pytest.raises(UserError, match="no weights"):
        load(str(tmp_path), label_names=names)


@pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="needs the package gguf: pip install gguf"
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file(tied: bool, tmp_path: Path) -> None:
    from tests.helpers.gguf_files import tiny_model, write_gguf

    path = write_gguf(tmp_path / "tiny.gguf", *tiny_model("llama", tied=tied))
    assert shapes(skeleton(str(path), head="causal-lm")) == shapes(load(str(path), head="causal-lm")[0])


def test_of_a_hub_id_no_weights_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def fetch(spec: str, files: list[str]) -> Path:
        asked.append(files)
        registry.EMBEDDED.get("gpt2").configuration(head="causal-lm")[0].save_pretrained(tmp_path)
        return tmp_path

    monkeypatch.setattr(source, "_from_hub", fetch)
    whole = synthetic.backbone("gpt2", head="causal-lm")[0]
    for spec in ("openai-community/gpt2", "new:openai-community/gpt2"):
        assert shapes(skeleton(spec, head="causal-lm")) == shapes(whole)
    assert asked == [source.SMALL, source.SMALL]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("embedded/t6", "unknown embedded backbone"),
        ("./nowhere", "no folder"),
        ("package:nowhere_at_all/x", "no installed package"),
    ],
)
def test_what_is_wrong_is_said(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        skeleton(spec)


def test_a_head_that_there_is_not() -> None:
    with pytest.raises(UserError, match="has no head"):
        skeleton("embedded/bert", head="causal-lm")
    with pytest.raises(UserError, match="unknown head"):
        skeleton("embedded/bert", head="causal")
