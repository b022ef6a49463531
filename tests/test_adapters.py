"""Adapters: what was trained, saved by itself; the same logits on the backbone made again; what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from camex_ft.backbones.loading import load as load_backbone
from camex_ft.upcycling import load, restore, save, trained_state, upcycle
from camex_ft.utils.errors import UserError
from tests.helpers.invariant_cases import dense, output, shake
from tests.helpers.lora_models import ABLE, CLASSIFIER, FIRST, HEADS, SOME, lora, train
from tests.helpers.tiny import inputs_of

TUNING = {"mode": "lora", "lora": {"rank": 2}}
MERGING = {"protocol": "domain-ca", "experts": 3, "curvature": {"rank": 2}}


def same(one: PreTrainedModel, other: PreTrainedModel, head: str = CLASSIFIER) -> bool:
    inputs = inputs_of(one, head)
    with torch.no_grad():
        return torch.equal(output(one, inputs), output(other, inputs))


# -- there and back


@pytest.mark.parametrize(
    ("model_type", "protocol"), [(t, p) for t in FIRST for p in (ABLE if t == "gpt2" else SOME)]
)
def test_the_same_logits_on_the_backbone(model_type: str, protocol: str, tmp_path: Path) -> None:
    for head in {CLASSIFIER, HEADS.get(model_type, CLASSIFIER)}:
        made = train(lora(model_type, head, protocol))
        save(made, tmp_path)
        files = {path.name for path in tmp_path.iterdir()}
        assert {"adapter.safetensors", "adapter.json", "config.json"} <= files
        assert "model.safetensors" not in files
        loaded = load(tmp_path, backbone=dense(model_type, head))
        assert same(made, loaded, head) and not loaded.training
        trained = {n for n, p in made.named_parameters() if p.requires_grad}
        assert {n for n, p in loaded.named_parameters() if p.requires_grad} == trained
        assert set(load_file(tmp_path / "adapter.safetensors")) == set(trained_state(made)) >= trained


def test_a_backbone_of_half_weights(tmp_path: Path) -> None:
    given = copy.deepcopy(dense("bert", CLASSIFIER)).to(torch.bfloat16)
    made = train(upcycle(given, merging=MERGING, tuning=TUNING)).eval()
    save(made, tmp_path)
    assert same(made, load(tmp_path, backbone=dense("bert", CLASSIFIER)))  # float32, rounded as it was


@pytest.mark.parametrize("form", ["embedded", "folder", "new"])
def test_the_backbone_is_found_by_its_name(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "backbone"
    if form != "embedded":
        model, tokenizer = load_backbone("embedded/t5", num_labels=2, seed=3)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    spec = {"embedded": "embedded/t5", "folder": str(folder), "new": f"new:{folder}"}[form]
    given, _ = load_backbone(spec, label_names=["no", "yes", "perhaps"], seed=5)
    made = train(upcycle(given, merging=MERGING, tuning=TUNING, seed=5, in_place=True)).eval()
    save(made, tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    assert same(made, loaded) and loaded.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    assert loaded.config.problem_type == "single_label_classification"
    save(loaded, tmp_path / "again")  # it is an adapter's model itself
    assert same(made, load(tmp_path / "again"))


def test_a_regression(tmp_path: Path) -> None:
    given, _ = load_backbone("embedded/bert", regression=True)
    save(train(upcycle(given, merging=MERGING, tuning=TUNING)), tmp_path)
    assert load(tmp_path).config.problem_type == "regression"


def test_a_state_that_was_gathered_is_what_is_written(tmp_path: Path) -> None:
    made = lora()
    state = {name: tensor + 1 for name, tensor in made.state_dict().items()}
    save(made, tmp_path, state=state)
    found = load_file(tmp_path / "adapter.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())


def test_other_models_are_saved_whole(tmp_path: Path) -> None:
    made = shake(upcycle(dense("bert", CLASSIFIER), merging={**MERGING, "protocol": "ties"})).eval()
    save(made, tmp_path)
    assert (tmp_path / "model.safetensors").is_file() and not (tmp_path / "adapter.json").exists()
    assert same(made, load(tmp_path))


def test_buffers_that_change_belong_to_what_is_trained() -> None:
    made = upcycle(dense("bert", CLASSIFIER), merging={"protocol": "fisher", "experts": 2, "options": {}})
    kept = trained_state(made)
    assert any(name.endswith(".statistic") for name in kept)
    assert set(kept) == set(made.state_dict()), "with full tuning it is everything"


def test_what_was_trained_goes_into_a_model_of_the_same_plan(tmp_path: Path) -> None:
    made, other = train(lora()), lora()
    save(made, tmp_path)
    assert not same(made, other)
    restore(other, tmp_path)
    assert same(made, other)


def test_a_whole_checkpoint_of_low_rank_experts_loads_too(tmp_path: Path) -> None:
    made = train(lora("gpt2"))
    made.save_pretrained(tmp_path)
    inputs = inputs_of(made, CLASSIFIER)
    # tensors that lie in the file are aligned otherwise, which may round otherwise
    torch.testing.assert_close(output(load(tmp_path), inputs), output(made, inputs), rtol=1e-5, atol=1e-5)


# -- what is refused


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given, _ = load_backbone("embedded/bert", num_labels=2)
    folder = tmp_path_factory.mktemp("saved")
    save(train(upcycle(given, merging=MERGING, tuning=TUNING)), folder)
    return folder


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """An adapter to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def rewrite(folder: Path, change: Any) -> None:
    file = folder / "adapter.json"
    said = json.loads(file.read_text())
    change(said)
    file.write_text(json.dumps(said))


@pytest.mark.parametrize("seed", [0, 1])
def test_another_backbone(adapter: Path, seed: int) -> None:
    other, _ = load_backbone("embedded/bert", num_labels=2, seed=seed)
    if seed == 0:
        load(adapter, backbone=other)
        with torch.no_grad():
            other.bert.embeddings.word_embeddings.weight[3, 5] += 1e-3
    with pytest.raises(
        UserError, match=r"is an adapter of another backbone than embedded/bert.*SHA-256.*seed"
    ):
        load(adapter, backbone=other)


def test_a_backbone_that_is_gone(adapter: Path, tmp_path: Path) -> None:
    rewrite(adapter, lambda said: said["backbone"].update(name=str(tmp_path / "gone")))
    with pytest.raises(UserError, match=r"(?s)its backbone .*gone cannot be made.*load\(folder, backbone="):
        load(adapter)


def test_a_backbone_without_a_name(tmp_path: Path) -> None:
    save(lora(), tmp_path)
    with pytest.raises(UserError, match=r"does not say which backbone it belongs to.*backbone=\.\.\."):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda said: said.update(format=2), r"is of format 2, written by camex_ft .* reads formats up to 1"),
        (lambda said: said.pop("backbone"), r"adapter.json is not usable"),
        (lambda said: said["backbone"].update(dtype="float9"), r"adapter.json is not usable"),
        (lambda said: said["plan"]["merging"].update(protocol="gone"), r"unknown protocol 'gone'"),
        (lambda said: said["plan"]["tuning"]["lora"].update(rank=3), r"do not match, such as"),
        (lambda said: said["plan"]["upcycle"].update(layers=[0]), r"adapter of another backbone"),
    ],
)
def test_a_description_that_is_spoilt(adapter: Path, change: Any, said: str) -> None:
    rewrite(adapter, change)
    with pytest.raises(UserError, match=said):
        load(adapter)


def test_a_description_that_is_not_json(adapter: Path) -> None:
    (adapter / "adapter.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter.json is not usable: JSONDecodeError"):
        load(adapter)


@pytest.mark.parametrize("size", [0, 100])
def test_weights_that_are_cut_short(adapter: Path, size: int) -> None:
    file = adapter / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=r"adapter.safetensors cannot be read"):
        load(adapter)


def test_weights_that_are_missing(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter.safetensors")
    gone = next(name for name in tensors if name.endswith("expert_in"))
    del tensors[gone]
    save_file(tensors, adapter / "adapter.safetensors")
    with pytest.raises(UserError, match=rf"1 weights do not match, such as {gone}"):
        load(adapter)
    (adapter / "adapter.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter.safetensors cannot be read"):
        load(adapter)


def test_a_config_that_is_spoilt(adapter: Path) -> None:
    (adapter / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        load(adapter)
