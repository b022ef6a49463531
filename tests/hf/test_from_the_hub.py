"""Upcycled models and adapters by their id on the hub: by `camex_ft.load` and by the auto classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from camex_ft.backbones.heads import HEADS
from camex_ft.backbones.loading import load as load_backbone
from camex_ft.upcycling import adapters, load, upcycle
from camex_ft.utils import hub as asking
from camex_ft.utils.errors import UserError
from tests.helpers.hub_server import Hub
from tests.helpers.invariant_cases import Case, shake, upcycled
from tests.helpers.lora_models import LORA, train
from tests.helpers.tiny import inputs_of

CLASSIFIER = "sequence-classification"
MERGING = {"protocol": "domain-ca", "experts": 2, "curvature": {"rank": 1}}
ABSENT = {"pytorch_model.bin": b"not to be fetched", "README.md": b"# a model"}


def content(folder: Path) -> dict[str, bytes]:
    return {**{path.name: path.read_bytes() for path in folder.iterdir()}, **ABSENT}


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """A whole checkpoint in shards, an adapter, and the backbone that the adapter names."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("whole", "adapter", "bert")}
    shake(upcycled(Case("bert", CLASSIFIER, "ties-ca", "auto"))).save_pretrained(
        folders["whole"], max_shard_size="4KB"
    )
    plain, tokenizer = load_backbone("embedded/bert", num_labels=2)
    for part in (plain, tokenizer):
        part.save_pretrained(folders["bert"])
    given, _ = load_backbone(str(folders["bert"]), label_names=["no", "yes"])
    given.name_or_path = given.config.name_or_path = "me/bert"
    adapters.save(train(upcycle(given, merging=MERGING, tuning=LORA)), folders["adapter"])
    return {f"models/me/{name}": content(folder) for name, folder in folders.items()}


@pytest.fixture
def hub(
    contents: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    made = Hub(repositories=dict(contents))
    made.start()
    address = f"http://127.0.0.1:{made.port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(asking, "SECONDS", 1.0)
    monkeypatch.chdir(tmp_path)
    close_session()
    yield made
    made.stop()
    close_session()


@torch.no_grad()
def test_by_its_id(hub: Hub, tmp_path: Path) -> None:
    """Whole and as an adapter, fetched once, then without the hub; nothing else of the repository comes along."""
    for name in ("whole", "adapter"):
        made = load(f"me/{name}")
        ids = inputs_of(made, CLASSIFIER)
        due = made(**ids).logits
        assert torch.equal(HEADS[CLASSIFIER].from_pretrained(f"me/{name}")(**ids).logits, due)
        assert not set(ABSENT) & set(hub.files)
    load("me/whole", revision="v1")
    assert any(path.endswith("me/whole/revision/v1") for _, path in hub.asked)
    fetched = len(hub.asked)
    hub.stop()
    close_session()  # whose connections outlive the server
    assert torch.equal(load("me/adapter")(**ids).logits, due) and len(hub.asked) == fetched
    with pytest.raises(UserError, match=r"'me/else', and as an id on the hub: it is not in the hub cache"):
        load("me/else")


def test_what_is_not_there_or_not_safe(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder 'me/else'.*the hub has no model 'me/else'"):
        load("me/else")
    for spec in ("./me/whole", "a/b/c", "whole", "", Path("me/whole")):  # folders, and no ids
        with pytest.raises(UserError, match=r"there is no folder .*NAME/MODEL"):
            load(spec)
    assert not hub.files
    whole: dict[str, Any] = hub.repositories["models/me/whole"]
    index = whole["model.safetensors.index.json"].replace(b'"model-00001', b'"../../model-00001')
    hub.repositories["models/me/whole"] = {**whole, "model.safetensors.index.json": index}
    with pytest.raises(UserError, match=r"which is no file of the folder itself"):
        load("me/whole")
    own = {n: c for n, c in hub.repositories["models/me/adapter"].items() if n != "adapter.safetensors"}
    hub.repositories["models/me/part"] = own
    with pytest.raises(UserError, match=r"adapter.safetensors cannot be read"):
        load("me/part")
