"""Backbones in GGUF files: the same model as the one that was written, a plain one, or a word about what is wrong."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import camex_ft
from camex_ft.backbones import source
from camex_ft.backbones.loading import load
from camex_ft.utils.errors import UserError

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
from tests.helpers.gguf_files import tiny_model, write_gguf  # noqa: E402

TEXT = " the film is good , the ending Über dull"


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any]:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def written(llama: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", *llama)


def equal(left: Any, right: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_model_comes_back_as_it_was_written(architecture: str, tied: bool, tmp_path: Path) -> None:
    """Bit for bit: the file holds float32, and moving rows about rounds nothing."""
    model, tokenizer = tiny_model(architecture, tied=tied)
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    found, its = load(str(path), head="causal-lm")
    ids = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids
    assert torch.equal(its(TEXT, return_tensors="pt").input_ids, ids)
    assert equal(found, model)
    with torch.no_grad():
        # the norms' epsilon is float32 in the file: 1e-6 to 7 digits
        torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) == tied
    assert len(its) == model.config.vocab_size
    assert found.config.pad_token_id == its.pad_token_id == tokenizer.pad_token_id
    assert found.name_or_path == its.name_or_path == str(path)
    assert not found.training


def test_quantised_weights_are_turned_back(llama: tuple[Any, Any], tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q4_1
    path = write_gguf(tmp_path / "tiny.gguf", *llama, quantise=kind)
    found, _ = load(str(path), head="causal-lm")
    name = "model.layers.1.mlp.down_proj.weight"
    weight = llama[0].get_parameter(name).detach().numpy()
    due = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    assert torch.equal(found.get_parameter(name), torch.tensor(due))


def test_it_is_no_quantised_model(written: Path, tmp_path: Path) -> None:
    """transformers says so of every model from a GGUF file, and then neither trains nor saves it."""
    found, tokenizer = load(str(written), head="causal-lm")
    transformers.Trainer(found, transformers.TrainingArguments(str(tmp_path / "run"), report_to="none"))
    found.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "quant" not in (tmp_path / "config.json").read_text()
    again, its = load(str(tmp_path), head="causal-lm")
    assert equal(found, again)
    assert its(TEXT).input_ids == tokenizer(TEXT).input_ids
    model = camex_ft.upcycle(found, merging={"protocol": "ties-ca", "experts": 2})
    model.save_pretrained(tmp_path / "upcycled")
    assert equal(model, camex_ft.load(tmp_path / "upcycled"))


def test_a_new_classifier(written: Path, llama: tuple[Any, Any]) -> None:
    first, again, other = (load(str(written), num_labels=3, seed=seed)[0] for seed in (5, 5, 6))
    assert equal(first, again)
    assert first.get_parameter("score.weight").shape == (3, 32)
    assert not torch.equal(first.get_parameter("score.weight"), other.get_parameter("score.weight"))
    assert torch.equal(first.get_input_embeddings().weight, llama[0].get_input_embeddings().weight)


def test_it_is_found_whatever_the_working_folder_holds(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: tuple[Any, Any]
) -> None:
    """transformers would take a file of the same name in the working folder; so does a package's file hold its own."""
    write_gguf(tmp_path / written.name, *tiny_model("llama", seed=7))
    monkeypatch.chdir(tmp_path)
    assert equal(load(str(written), head="causal-lm")[0], llama[0])
    root = tmp_path / "site" / "models_of_mine"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    (root / written.name).write_bytes(written.read_bytes())
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert equal(load("package:models_of_mine/tiny.gguf", head="causal-lm")[0], llama[0])
    with pytest.raises(
        UserError, match=r"has no such file. Did you mean 'tiny.gguf'\? Models in it: tiny.gguf"
    ):
        source.check("package:models_of_mine/tny.gguf")


def test_new_weights_for_its_architecture(written: Path, llama: tuple[Any, Any]) -> None:
    first, again, other = (load(f"new:{written}", head="causal-lm", seed=seed)[0] for seed in (5, 5, 6))
    assert equal(first, again)
    assert not equal(first, other)
    assert not equal(first, llama[0])
    assert first.config.hidden_size == 32
    assert len(load(f"new:{written}", head="causal-lm")[1]) == llama[0].config.vocab_size


def lose(name: str) -> dict[str, Any]:
    return {"edit": lambda tensors: tensors.pop(name)}


def gain(name: str, size: int) -> dict[str, Any]:
    return {"edit": lambda tensors: tensors.update({name: torch.ones(size).numpy()})}


def say(call: Callable[[Any], Any]) -> dict[str, Any]:
    return {"more": call}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no family": ({"architecture": "mamba"}, "architecture 'mamba', which no backbone family serves"),
    "no tokenizer": ({"vocabulary": False}, r"has no tokenizer in it \(tokenizer.ggml.tokens\)"),
    "lost weight": (
        lose("blk.1.ffn_down.weight"),
        "1 weights of the backbone .* model.layers.1.mlp.down_proj.weight",
    ),
    "lost embeddings": (lose("token_embd.weight"), "weights of the backbone are missing.*embed_tokens"),
    "unread bias": (
        gain("blk.0.attn_q.bias", 32),
        r"1 tensors that transformers does not read .*1 of shape \[32\]",
    ),
    "unread frequencies": (gain("rope_freqs.weight", 4), "scales its rotary positions"),
    "unread scaling": (
        say(lambda w: w.add_string("llama.rope.scaling.type", "yarn")),
        "scales its rotary positions",
    ),
    "one part": (say(lambda w: w.add_uint16("split.count", 3)), "is one of 3 parts; join them first"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_does_not_serve(wrong: str, llama: tuple[Any, Any], tmp_path: Path) -> None:
    options, message = WRONG[wrong]
    path = write_gguf(tmp_path / "tiny.gguf", *llama, **options)
    with pytest.raises(UserError, match=f"(?s)backbone {path}: .*{message}"):
        load(str(path), head="causal-lm")


def test_a_head_that_it_has_not(written: Path) -> None:
    with pytest.raises(UserError, match=r"llama has no head 'seq2seq-lm'; it has base, .*, causal-lm"):
        load(str(written), head="seq2seq-lm")


def test_a_tokenizer_that_cannot_be_read(llama: tuple[Any, Any], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", *llama, kind="words")
    with pytest.raises(UserError, match=r"its tokenizer cannot be loaded: .*'words'"):
        load(str(path), head="causal-lm")


def test_without_the_package_gguf(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(UserError, match=r"pip install gguf"):
        source.check(str(written))


def test_names_of_files(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(written.parent)
    assert source.kind("tiny.gguf") == source.kind("new:./tiny.gguf") == "file"
    assert source.locate("tiny.gguf") == written
    with pytest.raises(UserError, match=r"there is no file 'tin.gguf'. Did you mean 'tiny.gguf'\?"):
        source.check("tin.gguf")
    with pytest.raises(UserError, match=r"no config.json.* write backbone: \./tiny.gguf"):
        source.check(".")


def test_loading_says_nothing(written: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(str(written), head="causal-lm")
    assert not caplog.records
    assert json.dumps(load(str(written), head="causal-lm")[0].config.to_dict())
