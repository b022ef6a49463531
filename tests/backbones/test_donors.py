"""Donors: located, loaded, adapters merged in, and those of another start, shape or vocabulary refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from camex_ft import synthetic
from camex_ft.backbones.donors import (
    Likeness,
    adapter_folder,
    backbone_of,
    check_donor,
    check_same_start,
    donor_digest,
    load_donor,
)
from camex_ft.utils.errors import UserError

SPEC = "embedded/llama"


@pytest.fixture(scope="module")
def start() -> tuple[Any, Any]:
    return synthetic.backbone("llama", head="causal-lm")


def perturbed(model: Any, seed: int) -> Any:
    donor = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return donor


def save(model: Any, tokenizer: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_adapter(model: Any, folder: Path, **options: Any) -> Any:
    """Write an adapter whose factors are not 0, and return the model that PEFT makes of it."""
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **options)
    adapted = get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


def test_a_folder_is_loaded_as_it_was_saved(start: Any, tmp_path: Path) -> None:
    model, tokenizer = start
    donor = perturbed(model, 0)
    spec = save(donor, tokenizer, tmp_path)
    loaded = load_donor(spec, model, head="causal-lm", tokenizer=tokenizer)
    assert not loaded.training
    for (name, before), after in zip(donor.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(before, after), name
    assert len(donor_digest(spec) or "") == 64


def test_a_run_stands_for_its_model(start: Any, tmp_path: Path) -> None:
    model, tokenizer = start
    save(model, tokenizer, tmp_path / "model")
    (tmp_path / "record.json").write_text("{}")
    assert backbone_of(str(tmp_path)) == str(tmp_path / "model")
    check_donor(str(tmp_path))
    assert donor_digest(str(tmp_path)) == donor_digest(str(tmp_path / "model"))


def test_a_run_without_a_model_or_with_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(UserError, match="a run without a model"):
        check_donor(str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "adapter.json").write_text("{}")
    with pytest.raises(UserError, match="--as dense"):
        check_donor(str(tmp_path))


def test_a_model_with_experts_is_refused(start: Any, tmp_path: Path) -> None:
    model, tokenizer = start
    spec = save(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "camex": {"format": 1}}))
    with pytest.raises(UserError, match="has experts already"):
        check_donor(spec)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 3}, {"use_dora": True}])
def test_an_adapter_is_merged_as_peft_does(start: Any, tmp_path: Path, options: Any) -> None:
    model, tokenizer = start
    expected = save_adapter(model, tmp_path, **options).state_dict()
    before = copy.deepcopy(model.state_dict())
    spec = f"adapter:{tmp_path}"
    loaded = load_donor(spec, model, head="causal-lm", tokenizer=tokenizer)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name]), name
        assert torch.equal(model.state_dict()[name], before[name]), name
    assert type(loaded) is type(model)
    assert len(donor_digest(spec) or "") == 64


def test_an_adapter_of_another_model_is_refused(start: Any, tmp_path: Path) -> None:
    other, _ = synthetic.backbone("bert", head="base")
    config = LoraConfig(r=2, target_modules=["query"])
    get_peft_model(other, config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not fit the start"):
        load_donor(f"adapter:{tmp_path}", start[0], head="causal-lm")


def test_an_adapter_that_lacks_a_tensor_is_refused(start: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_adapter(start[0], tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    with pytest.raises(UserError, match="1 tensors have no place"):
        load_donor(f"adapter:{tmp_path}", start[0], head="causal-lm")


@pytest.mark.parametrize("spec", ["adapter:", "adapter:./nowhere", "adapter:a/b/c"])
def test_an_adapter_that_is_not_there_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match="adapter"):
        adapter_folder(spec)


def test_a_pickled_adapter_is_refused(start: Any, tmp_path: Path) -> None:
    save_adapter(start[0], tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="refused"):
        check_donor(f"adapter:{tmp_path}")


def test_another_seed_is_another_start(start: Any, tmp_path: Path) -> None:
    other, tokenizer = synthetic.backbone("llama", head="causal-lm", seed=1)
    spec = save(other, tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"the cosine between its matrices and those of the start is -?0\.0"):
        load_donor(spec, start[0], head="causal-lm", tokenizer=tokenizer)


def test_another_architecture_is_refused(start: Any) -> None:
    with pytest.raises(UserError, match="its model_type is mistral, that of the start is llama"):
        load_donor("embedded/mistral", start[0], head="causal-lm")


def test_another_number_of_heads_is_refused(start: Any, tmp_path: Path) -> None:
    model, tokenizer = start
    spec = save(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(UserError, match="its hidden_act is gelu, that of the start is silu"):
        load_donor(spec, model, head="causal-lm")


def test_another_width_is_refused(start: Any, tmp_path: Path) -> None:
    model, tokenizer = start
    config = copy.deepcopy(model.config)
    config.intermediate_size = 96
    spec = save(type(model)(config), tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"gate_proj.weight is \[96, 64\] instead of \[128, 64\]"):
        load_donor(spec, model, head="causal-lm")


def test_another_vocabulary_is_refused(start: Any, tmp_path: Path) -> None:
    model, tokenizer = start
    spec = save(perturbed(model, 0), tokenizer, tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="differs from that of the start in 2 tokens"):
        load_donor(spec, model, head="causal-lm", tokenizer=tokenizer)


def test_the_cosine_is_that_of_all_matrices_together(start: Any) -> None:
    model = start[0]
    donor = perturbed(model, 3)
    likeness = Likeness()
    for here, there in zip(model.parameters(), donor.parameters(), strict=True):
        likeness.add(here.detach(), there.detach())
    flat = [
        torch.cat([p.detach().double().flatten() for p in m.parameters() if p.dim() > 1])
        for m in (model, donor)
    ]
    expected = torch.nn.functional.cosine_similarity(*flat, dim=0)
    assert likeness.cosine == pytest.approx(float(expected), abs=1e-6)  # products in float32
    check_same_start(model, donor, spec="donor")
    assert Likeness().cosine == 1.0
