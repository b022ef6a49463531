"""Plans: counted by hand at published sizes, equal to what is really built, and made of every shipped configuration."""

from __future__ import annotations

import importlib.util
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console

from camex_ft import estimate, synthetic
from camex_ft.backbones import source
from camex_ft.backbones.loading import skeleton
from camex_ft.config import list_configs, load_config
from camex_ft.estimate.show import print_plan, write_json
from camex_ft.training.cost import count_parameters, describe
from camex_ft.upcycling import freeze, upcycle
from camex_ft.utils import registry
from camex_ft.utils.errors import UserError
from tests.helpers.tiny import config_of

N, R = 8, 4
MERGING = [f"merging.experts={N}", "merging.top_k=2", f"merging.curvature.rank={R}", "upcycle.layers=all"]
FACTORS = {768: (24, 32), 3072: (48, 64), 4096: (64, 64), 11008: (86, 128)}
T5_BASE = {
    "d_model": 768,
    "d_ff": 3072,
    "d_kv": 64,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_heads": 12,
}


def squares(*sizes: int) -> int:
    return sum(factor**2 for size in sizes for factor in FACTORS[size])


def plan_of(tmp_path: Path, model_type: str, *overrides: str, **sizes: Any) -> dict[str, estimate.Column]:
    """Columns by name, for a backbone of which there is a config.json and nothing else."""
    transformers.AutoConfig.for_model(model_type, pad_token_id=0, **sizes).save_pretrained(tmp_path)
    suite = "lm" if model_type != "t5" else "glue"
    given = load_config(suite, ["profile=embedded", f"backbone=new:{tmp_path}", *MERGING, *overrides])
    return {column.protocol: column for column in estimate.plan(given, gpu=False).columns}


def test_t5_base_by_hand(tmp_path: Path) -> None:
    found = plan_of(tmp_path, "t5", "merging.protocol=domain-ca", "task.max_length=128", **T5_BASE)
    attention, layer, head = 4 * 768 * 768, 2 * 768 * 3072, 768 * 768 + 768 + 768 * 2 + 2
    norms, biases = (12 * 2 + 12 * 3 + 2) * 768, 2 * 32 * 12
    dense = 32128 * 768 + 36 * attention + 24 * layer + norms + biases + head
    routers, curvature = 24 * 2 * 768 * N, 24 * 2 * N * R * squares(768, 3072)
    for name, base in (
        ("domain-ca", 24 * layer),
        ("ep-camex", 2 * layer),
        ("smoe", 0),
    ):  # one a layer, one a stack
        curved = curvature if base else 0
        met = dense + routers + (24 * layer if name == "smoe" else 0)  # k is 2
        assert asdict(found[name].parameters) == {
            "total": dense + 24 * (N - 1) * layer + base + routers + curved,
            "trainable": found[name].parameters.total,
            "active": met,
            "experts": 24 * N * layer,
            "base": base,
            "routers": routers,
            "curvature": curved,
            "statistics": 0,
        }
    assert found["dense"].parameters.total == found["dense"].parameters.active == dense
    merged = found["domain-ca"].operations
    assert merged.maps == found["dense"].operations.maps == 24 * layer
    assert merged.merging == 24 * N * layer / 128
    assert merged.curvature == pytest.approx(24 * R * N * layer * (24 + 32 + 48 + 64) / (32 * 128), rel=1e-12)
    assert found["smoe"].operations.maps == 2 * 24 * layer
    carried = 22 * layer * N / (32 * 128)
    assert found["ep-camex"].operations.chain == pytest.approx(carried, rel=1e-12)


def test_gpt2_by_hand(tmp_path: Path) -> None:
    found = plan_of(tmp_path, "gpt2", "merging.protocol=domain")
    layer, curvature = 2 * 768 * 3072 + 768 + 3072, 2 * squares(768, 3072) + squares(768) + squares(3072)
    attention = 4 * 768 * 768 + 4 * 768
    dense = (50257 + 1024) * 768 + 12 * (layer + attention + 4 * 768) + 2 * 768
    routers = 12 * (2 * 768 * N + N)  # and a prior for first segments
    assert found["dense"].parameters.total == dense
    assert found["domain"].parameters.total == dense + 12 * N * layer + routers
    carried = found["ep-camex"].parameters
    assert carried.total == dense + 12 * (N - 1) * layer + layer + routers + 12 * N * R * curvature
    assert carried.active == found["domain"].parameters.active == dense + routers


def test_llama_by_hand(tmp_path: Path) -> None:
    found = plan_of(tmp_path, "llama", "merging.protocol=domain-ca", "upcycle.layers=every_other")
    layer, attention = 3 * 4096 * 11008, 4 * 4096 * 4096
    dense = 2 * 32000 * 4096 + 32 * (layer + attention + 2 * 4096) + 4096
    assert found["dense"].parameters.total == dense
    routers, curvature = 16 * (2 * 4096 * N + N), 16 * 3 * N * R * squares(4096, 11008)
    assert found["domain-ca"].parameters.total == dense + 16 * N * layer + routers + curvature
    assert found["domain-ca"].operations.maps == 32 * layer


@pytest.mark.parametrize("protocol", registry.PROTOCOLS.names())
@pytest.mark.parametrize("mode", ["full", "experts"])
def test_a_plan_counts_what_is_built(protocol: str, mode: str) -> None:
    """Every tensor of the model without weights has its like, by name and shape, in the one that a run builds."""
    if protocol == "dense" and mode == "experts":
        return  # refused by the configuration
    given = load_config("glue", ["profile=embedded", f"merging.protocol={protocol}", f"tuning.mode={mode}"])
    settled, _ = estimate.configuration.resolve(given)
    own = next(column for column in estimate.plan(given).columns if column.own)
    built = upcycle(
        synthetic.backbone("t5", num_labels=2)[0],
        merging=settled.merging,
        routing=settled.routing,
        upcycle=settled.upcycle,
    )
    freeze(built, mode)
    assert own.protocol == protocol
    assert own.parameters == count_parameters(built)
    assert own.parameters.total == sum(p.numel() for p in built.parameters())
    assert own.parameters.trainable == sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert own.parameters.active == describe(built)["active"]
    assert own.memory.weights == sum(t.nbytes for t in (*built.parameters(), *built.buffers()))


def test_fishers_statistics_are_as_large_as_the_experts() -> None:
    found = estimate.plan(load_config("glue", ["profile=embedded", "merging.protocol=fisher"]))
    columns = {column.protocol: column for column in found.columns}
    assert columns["fisher"].parameters.statistics == columns["fisher"].parameters.experts
    assert columns["fisher"].parameters.curvature == columns["domain-ca"].parameters.statistics == 0


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that has tiny configurations, and no weights, of the families that shipped files name; data are nowhere."""
    kinds = ["distilbert", "roberta", "bert", "t5", "gpt2", "qwen2", "mistral"]

    def fetch(spec: str, files: list[str]) -> Path:
        kind = next((k for k in kinds if k in spec.lower().replace(".5", "2")), "llama")
        folder = tmp_path / spec.replace("/", "--")
        config_of(kind, {"max_position_embeddings": 2048}).save_pretrained(folder)
        assert "*.safetensors" not in files
        return folder

    monkeypatch.setattr(source, "_from_hub", fetch)
    monkeypatch.setattr("camex_ft.data.sources.load", None)


@pytest.mark.parametrize("profile", ["embedded", "paper"])
@pytest.mark.usefixtures("hub")
def test_every_shipped_configuration_has_a_plan(profile: str) -> None:
    seen = set()
    for shipped in list_configs():
        if profile == "paper" and "/" in shipped.name:
            continue  # the suites tell the profiles apart
        if shipped.name.startswith("profiles/paper"):
            continue  # planned as the profile that it is
        given = load_config(shipped.name, [f"profile={profile}"])
        package = given.backbone.removeprefix("package:").partition("/")[0]
        if given.backbone.startswith("package:") and importlib.util.find_spec(package) is None:
            continue
        found = estimate.plan(given, gpu=False)
        own = [column for column in found.columns if column.own]
        assert len(own) == 1, shipped.name
        assert own[0].protocol == given.merging.protocol
        assert {"dense", "smoe", "ep-camex"} <= {column.protocol for column in found.columns}
        assert all(column.memory.activations > 0 for column in found.columns)
        seen.add(found.task.partition("/")[0])
    assert {"glue", "superglue", "lm", "qa"} <= seen


def test_what_only_the_own_protocol_allows_is_left_out_elsewhere() -> None:
    overrides = ["profile=embedded", "merging.protocol=ties-ca", "tuning.mode=experts"]
    given = load_config("glue", [*overrides, "merging.options.density=0.5", "routing.granularity=sequence"])
    found = {column.protocol: column.parameters for column in estimate.plan(given).columns}
    assert set(found) == {"dense", "smoe", "ties-ca", "ep-camex"}
    assert found["dense"].trainable == found["dense"].total
    assert found["smoe"].trainable < found["smoe"].total


def test_micro_batches_share_domain_vectors() -> None:
    """What is kept is T, in float32, of all experts; its gradient becomes theirs. T5 has no biases."""
    given = ["profile=embedded", "merging.protocol=domain-ca"]
    (one, four) = (
        {c.protocol: c for c in estimate.plan(load_config("glue", [*given, *more])).columns}
        for more in ([], ["training.gradient_accumulation_steps=4"])
    )
    shared, alone = four["domain-ca"], one["domain-ca"]
    assert shared.operations.curvature == alone.operations.curvature / 4
    assert shared.operations.merging == alone.operations.merging
    assert (shared.memory.vectors, alone.memory.vectors) == (4 * alone.parameters.experts, 0)
    assert four["smoe"].memory.vectors == 0


def test_a_trained_tokenizer_counts_as_full(tmp_path: Path) -> None:
    given = ["profile=embedded", "task.name=text", f"data.dir={tmp_path / 'nowhere'}"]
    found = estimate.plan(load_config("lm", given))
    assert any("tokenizer" in note for note in found.notes)
    assert found.columns[0].parameters.total > 4096 * 64


def test_a_chain_is_told_of_and_everything_fits_a_terminal(tmp_path: Path) -> None:
    found = estimate.plan(load_config("qa", ["profile=embedded", "merging.protocol=namex"]))
    for console in (Console(record=True, width=100), Console(record=True, width=100, force_terminal=True)):
        print_plan(found, console=console)
        shown = console.export_text()
        assert max(map(len, shown.splitlines())) <= 100
        assert "namex *" in shown
        assert (
            "ep-camex, chain in the encoder: 2 layers from encoder.block.0.layer.1.DenseReluDense on" in shown
        )
    write_json(found, tmp_path / "plan.json")
    read = json.loads((tmp_path / "plan.json").read_text())
    for column, entry in zip(found.columns, read["columns"], strict=True):
        assert entry["parameters"] == asdict(column.parameters)
        assert entry["operations"]["total"] == column.operations.total
        assert entry["memory"] == asdict(column.memory)
        assert entry["duration"]["total"] == column.duration.computing > 0
    with pytest.raises(UserError, match="cannot be written"):
        write_json(found, tmp_path / "no" / "plan.json")


def test_nothing_is_made_but_the_plan() -> None:
    """Neither weights nor random numbers."""
    model = skeleton("embedded/llama", head="causal-lm")
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"meta"}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    estimate.plan(load_config("glue", ["profile=embedded", "upcycle.init=noise"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate.plan(load_config("glue", ["profile=embedded", "upcycle.init=drop"]))
    assert torch.equal(before, torch.get_rng_state())
