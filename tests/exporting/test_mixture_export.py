"""A run that started from a sparse mixture, exported: as the mixture again, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from camex_ft.backbones.loading import load as load_backbone
from camex_ft.config import load_config
from camex_ft.exporting.export import export, lines
from camex_ft.run import pipeline
from camex_ft.training.cost import count_parameters
from camex_ft.upcycling import load
from camex_ft.utils.errors import UserError
from tests.helpers.tiny import CHOSEN, OWN, config_of

# float32: the products of a token's experts in another order, on logits of about 1
TOLERANCE = 1e-5
SETTINGS = {
    "profile": "embedded",
    "task": {"suite": "lm", "name": "wikitext-2", "block_size": 32},
    "data": {"source": "embedded", "train_rows": 40, "eval_rows": 20},
    "merging": {"protocol": "smoe"},
    "upcycle": {"init": "own-experts"},
    "training": {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "use_cpu": True,
    },
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Mixtral with random weights and an embedded backbone's tokenizer."""
    folder = tmp_path_factory.mktemp("backbones") / "tiny-mixtral"
    _, tokenizer = load_backbone("embedded/gpt2", head="causal-lm")
    config = config_of("mixtral", {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id})
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_of(backbone: Path, output: Path, protocol: str) -> Path:
    settings = {**SETTINGS, "backbone": str(backbone), "output": {"dir": str(output)}}
    file = output / f"{protocol}.yaml"
    file.write_text(yaml.safe_dump({**settings, "merging": {"protocol": protocol}}))
    record = pipeline.run(load_config(str(file), []))
    assert (record.config["merging"]["experts"], record.config["merging"]["top_k"]) == (OWN, CHOSEN)
    return output / "runs" / record.run.name


@pytest.fixture(scope="module")
def run(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(backbone, tmp_path_factory.mktemp("results"), "smoe")


def test_the_mixture_computes_what_the_run_computes(run: Path, tmp_path: Path) -> None:
    exported = export(run, tmp_path / "mixture", as_="experts", rows=8)
    assert exported.difference.largest < TOLERANCE * max(1.0, exported.difference.scale)
    assert exported.after == pytest.approx(exported.before, rel=1e-5)
    mixture, model = AutoModelForCausalLM.from_pretrained(exported.folder).eval(), load(run / "model")
    assert type(mixture) is MixtralForCausalLM
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(mixture(ids).logits, model(ids).logits, rtol=0, atol=TOLERANCE)
    card = (exported.folder / "README.md").read_text()
    config = json.loads((exported.folder / "config.json").read_text())
    assert config["model_type"] == "mixtral" and "camex" not in config
    assert "A sparse mixture of the architecture of" in card and "library_name: transformers" in card


def test_a_token_meets_as_many_parameters_in_the_mixture(run: Path) -> None:
    """The routers' learned noise, which acts in training alone, is all that the run's model has beside them."""
    model = load(run / "model")
    mixture = MixtralForCausalLM(config_of("mixtral", {"vocab_size": model.config.vocab_size}))
    noise = sum(p.numel() for name, p in model.named_parameters() if name.endswith("router.noise"))
    assert count_parameters(model).active == count_parameters(mixture).active + noise


def test_merged_experts_are_said_to_compute_another_function(backbone: Path, tmp_path: Path) -> None:
    run = run_of(backbone, tmp_path, "domain-ca")
    exported = export(run, tmp_path / "mixture", as_="experts", rows=8)
    assert exported.difference.largest > 0
    assert "It computes another function." in lines(exported)[-1]
    folded = export(run, tmp_path / "folded", as_="folded", rows=8)
    assert folded.difference.largest < TOLERANCE * max(1.0, folded.difference.scale)


def test_a_dense_export_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="started from a sparse mixture: use --as experts"):
        export(run, tmp_path / "dense", as_="dense")
    assert not (tmp_path / "dense").exists()
