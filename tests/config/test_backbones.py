"""What a configuration says of a backbone before a model is built: GGUF files, packages and `new:`."""

import struct
from pathlib import Path

import pytest

from camex_ft.config import Config, ConfigErrors, config_hash, resolve
from camex_ft.config.identity import hash_by_name

PACKAGE = "package:weights_of_mine"


def said(backbone: str, environment) -> list[str]:
    try:
        resolve(Config.model_validate({"profile": "embedded", "backbone": backbone}), environment)
    except ConfigErrors as error:
        return [str(problem) for problem in error.problems]
    return []


def gguf(path: Path, *, architecture: str = "llama", tokens: int = 1) -> Path:
    """Write a GGUF file without tensors."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys = text("general.architecture") + struct.pack("<I", 8) + text(architecture)
    keys += text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, tokens) + text("a") * tokens
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + keys)
    return path


@pytest.fixture
def files(folder, monkeypatch):
    """A folder of models, and a package of them that fails when it is imported."""
    pytest.importorskip("gguf", reason="needs the package gguf")
    package = folder / "site" / "weights_of_mine"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "deep" / "config.json").write_text("{}")
    (package / "deep" / "model.safetensors").touch()
    monkeypatch.syspath_prepend(folder / "site")
    (folder / "models").mkdir()
    for place in (package, folder / "models"):
        gguf(place / "small.gguf")
    gguf(folder / "models" / "bird.gguf", architecture="bird")
    gguf(folder / "models" / "mute.gguf", tokens=0)
    (folder / "models" / "text.gguf").write_text("words")
    (folder / "models" / "short.gguf").write_bytes((folder / "models" / "small.gguf").read_bytes()[:30])
    return folder


@pytest.mark.parametrize(
    "backbone",
    ["models/small.gguf", "./models/small.gguf", "models", f"{PACKAGE}/small.gguf", f"{PACKAGE}/deep"],
)
def test_what_is_there_serves_with_and_without_new(files, machine, backbone):
    assert said(backbone, machine()) == said(f"new:{backbone}", machine()) == []


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        (
            "./models/smal.gguf",
            "there is no file './models/smal.gguf'. Did you mean 'small.gguf'? There: bird.gguf",
        ),
        ("smal.gguf", "there is no file 'smal.gguf'"),
        ("org/name/small.gguf", "there is no file 'org/name/small.gguf'"),
        ("models/bird.gguf", "holds a model of the architecture 'bird', which no backbone family serves"),
        ("models/mute.gguf", "mute.gguf has no tokenizer in it"),
        ("models/text.gguf", "text.gguf is no GGUF file: it does not begin with GGUF"),
        ("models/short.gguf", "short.gguf is corrupt or truncated"),
        (
            f"{PACKAGE}/smal.gguf",
            "has no such file. Did you mean 'small.gguf'? Models in it: deep, small.gguf",
        ),
        (
            f"{PACKAGE}/dep",
            "has no config.json in 'dep'. Did you mean 'deep'? Models in it: deep, small.gguf",
        ),
        (f"{PACKAGE}/../models/small.gguf", "the path must stay inside the package"),
        ("./model", "there is no folder './model'. Did you mean 'models'?"),
    ],
)
def test_what_is_wrong_is_said_with_and_without_new(files, machine, backbone, expected):
    for spec in (backbone, f"new:{backbone}"):
        (problem,) = said(spec, machine())
        assert problem.startswith("backbone: ")
        assert expected in problem


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("new:embedded/t5", "drawn from the seed already: write embedded/t5"),
        ("new:", "expected new: and one folder, .gguf file, package:NAME/PATH or hub id"),
        ("new:new:gpt2", "expected new: and one folder"),
        ("new:t5 base", "'t5 base' is neither a folder nor a hub id"),
        ("new:google-t5/t5-base", "the run needs the backbone google-t5/t5-base; "),
    ],
)
def test_new_alone(folder, machine, backbone, expected):
    (problem,) = said(backbone, machine())
    assert expected in problem


def test_new_needs_no_weights_in_the_cache(machine, folder):
    name = "google-t5/t5-base"
    assert said(f"new:{name}", machine(configured=(name,))) == []
    assert said(name, machine(configured=(name,))) != []


def digest(backbone: str, content: str = "") -> str:
    config = Config.model_validate({"profile": "embedded", "backbone": backbone})
    return config_hash(config, backbone=content)


SPECS = ("/a/model", "../b/model", "./model.gguf", "org/model", "package:a/model")


def test_the_content_takes_the_place_of_the_name_and_new_stays():
    assert len({digest(spec, "0f") for spec in SPECS}) == 1
    assert len({digest(f"new:{spec}", "0f") for spec in SPECS}) == 1
    assert len({digest(f"{new}/a/model", sha) for new in ("", "new:") for sha in ("0f", "1f")}) == 4


def test_without_its_content_a_local_backbone_goes_by_its_real_path(files):
    (files / "link").symlink_to("models")
    for new in ("", "new:"):
        names = [digest(f"{new}{name}") for name in ("models", "./models", f"{files}/models", "link/../link")]
        assert len(set(names)) == 1
        assert digest(f"{new}a/b/model") != digest(f"{new}a/c/model")
    assert len({digest(spec) for spec in ("package:a/model", "package:b/model", "new:package:a/model")}) == 3


def test_a_record_without_the_content_is_found_by_the_name():
    def by_name(backbone: str) -> str:
        return hash_by_name(Config.model_validate({"profile": "embedded", "backbone": backbone}), data="0f")

    for name in ("model", "model.gguf"):
        here = by_name(f"/a/{name}")
        assert here == by_name(f"../b/{name}") != by_name(f"/a/other{name}")
        assert by_name(f"new:/a/{name}") == by_name(f"new:./b/{name}") != here
    # as such records have them: a change of these values makes all of them look like other experiments
    assert (by_name("/a/model"), by_name("org/model")) == ("f5852f70", "06d5009a")
