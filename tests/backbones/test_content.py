"""The digest of a backbone's content: what it sees, what it does not, its cache, and what it costs."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from camex_ft import synthetic
from camex_ft.backbones import content, source
from camex_ft.backbones.donors import local_content_of
from camex_ft.utils.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved backbone, never changed."""
    folder = tmp_path_factory.mktemp("saved")
    for part in synthetic.backbone("bert", num_labels=2):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "x" / "hf"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An assets cache of its own, in which digests of files of any size and age are cached."""
    folder = tmp_path / "assets"
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(folder))
    monkeypatch.setattr(content, "LARGE", 0)
    monkeypatch.setattr(content, "SETTLED", -1)
    return folder


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


def test_the_place_does_not_count(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(model, tmp_path / "y" / "other")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "files").mkdir()
    for path in model.iterdir():  # as a snapshot of the hub cache has them
        (tmp_path / "files" / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    names = ["x/hf", "./x/../x/hf", str(model), "y/other", "link", "files"]
    assert len({content.digest(Path(name)) for name in names}) == 1
    assert {content.read(name) for name in ("x/hf", "link")} == {
        content.Content(Path(tmp_path / name), content.digest(model)) for name in ("x/hf", "link")
    }


def test_every_weight_counts(model: Path) -> None:
    """Also one that is changed in its last bit, which neither size nor header show."""
    before, file = content.digest(model), model / "model.safetensors"
    weights = load_file(file)
    for name in (min(weights), max(weights)):
        changed = {key: tensor.clone() for key, tensor in weights.items()}
        changed[name].view(torch.int32).view(-1)[-1] ^= 1
        save_file(changed, file, metadata={"format": "pt"})
        assert content.digest(model) != before
    save_file(weights, file, metadata={"format": "pt"})
    assert content.digest(model) == before


def test_every_byte_of_a_file_of_several_blocks_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "BLOCK", 64)
    monkeypatch.setattr(content, "PIECE", 24)
    file = tmp_path / "file"
    whole = bytes(range(200))
    made = set()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
        made.add(content._hash(file, len(whole)))
    for length in (0, 63, 64, 65, 128, 200):
        file.write_bytes(whole[:length])
        made.add(content._hash(file, length))
    assert len(made) == len(whole) + 6


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_configuration_and_tokenizer_count(model: Path, name: str) -> None:
    before = content.digest(model)
    text = (model / name).read_text()
    (model / name).write_text(text.replace("}", " }", 1))
    assert content.digest(model) != before != content.digest(model, weights=False)


def test_files_that_are_not_loaded_do_not_count(model: Path) -> None:
    before = content.digest(model)
    for name in ("README.md", "pytorch_model.bin", "training_args.bin", "model.fp16.safetensors"):
        (model / name).write_text("words")
    (model / "deep").mkdir()
    assert content.digest(model) == before


def test_of_a_new_model_weights_do_not_count(model: Path) -> None:
    before, whole = content.read(f"new:{model}").sha256, content.read(str(model)).sha256
    (model / "model.safetensors").write_bytes(b"")
    assert content.read(f"new:{model}").sha256 == before != whole


def test_shards_count(saved: Path, model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    halves = [dict(sorted(weights.items())[part::2]) for part in (0, 1)]
    for number, half in enumerate(halves):
        save_file(half, model / f"{number}.safetensors", metadata={"format": "pt"})
    index = {name: f"{number}.safetensors" for number, half in enumerate(halves) for name in half}
    (model / source.INDEX).write_text(json.dumps({"weight_map": index}))
    before = content.digest(model)
    halves[1][max(halves[1])] += 1
    save_file(halves[1], model / "1.safetensors", metadata={"format": "pt"})
    assert len({before, content.digest(model), content.digest(saved)}) == 3


def test_of_a_gguf_file_all_bytes_count_and_after_new_its_header(tmp_path: Path) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def digests(name: str, architecture: str, tail: bytes) -> tuple[str, str]:
        key = text("general.architecture") + struct.pack("<I", 8) + text(architecture)
        header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key
        file = tmp_path / name
        file.write_bytes(header + bytes(-len(header) % 32) * bool(tail) + tail)
        return content.digest(file), content.digest(file, weights=False)

    whole, header = digests("a.gguf", "llama", b"weights")
    assert digests("b.gguf", "llama", b"weights") == (whole, header)
    other, same = digests("a.gguf", "llama", b"Weights")
    assert other != whole and same == header
    assert (
        len({whole, header, *digests("a.gguf", "qwen2", b"weights"), *digests("a.gguf", "llama", b"")}) == 5
    )


def test_an_embedded_backbone_has_no_files() -> None:
    assert content.read("embedded/bert") == content.Content(None, None)


def test_what_is_not_there_is_said_or_not_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        content.read(f"{tmp_path}/nothing")
    for spec in (
        f"{tmp_path}/nothing",
        str(tmp_path),
        "org/name",
        "embedded/bert",
        "embedded/nothing",
        "package:a",
    ):
        assert local_content_of(spec) is None


@pytest.fixture
def hub_cache(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a model in the hub cache, on a machine that the hub does not answer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("camex_ft.utils.hub.silence", lambda *_: OSError("no network"))
    folder = tmp_path / "hub" / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    for revision in ("a" * 40, "b" * 40):
        shutil.copytree(saved, folder / "snapshots" / revision)
    (folder / "refs" / "main").write_text("a" * 40)
    return folder


def test_of_a_hub_id_the_snapshot_that_is_loaded_counts(hub_cache: Path, saved: Path) -> None:
    """Another revision counts where it changes what is loaded, and not where it changes its card."""
    first = content.read("org/name")
    assert first == (hub_cache / "snapshots" / ("a" * 40), content.digest(saved))
    (hub_cache / "snapshots" / ("b" * 40) / "README.md").write_text("a new card")
    (hub_cache / "refs" / "main").write_text("b" * 40)
    second = content.read("org/name")
    assert second.path != first.path and second.sha256 == first.sha256
    weights = load_file(second.path / "model.safetensors")
    weights[min(weights)] += 1
    save_file(weights, second.path / "model.safetensors", metadata={"format": "pt"})
    assert content.read("org/name").sha256 != first.sha256


def test_a_hub_id_that_is_nowhere_is_said(hub_cache: Path) -> None:
    with pytest.raises(UserError, match="other/name"):
        content.read("other/name")


# -- the cache


def test_a_file_is_hashed_once(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = content.digest(model)
    assert entries(cache)
    monkeypatch.setattr(content, "_hash", lambda *_: pytest.fail("hashed again"))
    assert content.digest(model) == first
    (model.parent / "link").symlink_to(model)
    assert content.digest(model.parent / "link") == first


def test_a_change_of_the_same_size_and_time_is_seen(model: Path, cache: Path) -> None:
    """As where weights are copied over others with their times."""
    before, file = content.digest(model), model / "model.safetensors"
    about, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert file.stat().st_mtime_ns == about.st_mtime_ns
    assert content.digest(model) != before


def test_a_file_that_has_just_changed_is_not_cached(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "SETTLED", 60.0)
    content.digest(model)
    assert entries(cache) == []


@pytest.mark.parametrize(
    "broken", ["", "{", "[]", "null", '"x"', "{}", '{"sha256": 1}', '{"sha256": "zz"}', "[" * 100_000, "\0"]
)
def test_a_broken_cache_is_ignored_and_mended(model: Path, cache: Path, broken: str) -> None:
    first = content.digest(model)
    for entry in entries(cache):
        entry.write_text(broken)
    assert content.digest(model) == first
    assert all(json.loads(entry.read_text())["sha256"] for entry in entries(cache))


def test_an_entry_of_another_length_is_not_taken(model: Path, cache: Path) -> None:
    """The header alone counts of a GGUF file after ``new:``, and both digests are under one path."""
    file = model / "model.safetensors"
    whole, half = content._of_file(file, file.stat().st_size), content._of_file(file, 64)
    assert whole != half == content._of_file(file, 64)
    assert content._of_file(file, file.stat().st_size) == whole


def test_without_a_cache_it_is_hashed_each_time(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = content.digest(model)
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    assert content.digest(model) == first
    cache.unlink()
    monkeypatch.setattr(content, "write_atomically", _full)
    assert content.digest(model) == first


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_several_at_once_agree(model: Path, cache: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: content.digest(model), range(16)))) == 1
    assert all(json.loads(entry.read_text()) for entry in entries(cache))


def test_the_cache_is_where_the_hub_has_its_own(model: Path, cache: Path) -> None:
    content.digest(model)
    assert all(entry.is_relative_to(cache / "camex_ft") for entry in entries(cache))


@pytest.mark.slow
def test_a_gigabyte_takes_two_seconds_of_a_processor_and_none_the_second_time(
    tmp_path: Path, cache: Path
) -> None:
    """Seconds of the processor, since others may use it too; several threads share them."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(1 << 24))
    started = time.process_time()
    first = content.digest(tmp_path)
    assert time.process_time() - started < 2
    started = time.perf_counter()
    assert content.digest(tmp_path) == first
    assert time.perf_counter() - started < 0.5
