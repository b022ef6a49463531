"""A run exported: what lies in the folder, that the numbers are measured ones, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from camex_ft.config import load_config
from camex_ft.exporting import export as exporting
from camex_ft.exporting.export import Exported, _change, export, lines
from camex_ft.run import inference, pipeline
from camex_ft.upcycling import expert_layers, load
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import TASKS

SETTINGS = {
    "profile": "embedded",
    "backbone": "embedded/bert",
    "task": {"suite": "glue", "name": "rte", "max_length": 48},
    "data": {"source": "embedded", "train_rows": 32, "eval_rows": 24},
    "merging": {"protocol": "ties-ca", "experts": 3, "top_k": 2, "curvature": {"rank": 1}},
    "upcycle": {"layers": [1]},
    "training": {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "learning_rate": 1e-2,
        "warmup_steps": 0.0,
        "disable_tqdm": True,
        "use_cpu": True,
    },
}
LAYER = "bert.encoder.layer.1.intermediate"
FILES = {
    "README.md",
    "config.json",
    "export.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    output = tmp_path_factory.mktemp("results")
    file = output / "run.yaml"
    file.write_text(yaml.safe_dump({**SETTINGS, "output": {"dir": str(output)}}))
    record = pipeline.run(load_config(str(file), []))
    return output / "runs" / record.run.name


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(run, tmp_path_factory.mktemp("exports") / "dense", as_="dense", rows=20)


@pytest.fixture
def dense(exported: Exported) -> Path:
    return exported.folder


def inputs(folder: Path) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["the cook went to the market", "a pilot"]
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


@torch.no_grad()
def test_the_dense_folder_is_a_plain_model_and_its_numbers_are_its_own(run, dense):
    assert {path.name for path in dense.iterdir()} == FILES
    plain = AutoModelForSequenceClassification.from_pretrained(dense)
    assert type(plain) is BertForSequenceClassification
    assert "camex" not in json.loads((dense / "config.json").read_text())
    numbers = json.loads((dense / "export.json").read_text())
    assert numbers["calibration"] == {"split": "train", "rows": 20}
    assert numbers["parameters"]["dense"] == plain.num_parameters()
    assert numbers["metrics"]["merged"] == pytest.approx(inference.evaluate(run))
    assert numbers["metrics"]["dense"] == pytest.approx(inference.read_trained(run).measure(plain.eval()))
    assert numbers["metrics"]["dense"] != numbers["metrics"]["merged"]
    card = ModelCard.load(dense / "README.md")
    (result,) = card.data.eval_results[:1]
    assert (result.metric_type, result.metric_value) == (
        "accuracy",
        pytest.approx(numbers["metrics"]["dense"]["validation_accuracy"], abs=1e-6),
    )
    assert "first 20 rows of the train split" in card.text


@torch.no_grad()
def test_routing_is_the_mean_over_the_calibration_rows(run, dense):
    """Row by row, without padding or batches; float32 weights, and a mean of 20 of them."""
    done = inference.read_trained(run)
    layer = expert_layers(done.model)[LAYER]
    found = []
    for row in done.data.train.select(range(20)):  # type: ignore[union-attr]
        row = {k: torch.tensor([v]) for k, v in row.items() if k != "labels"}
        done.model(**row)
        found.append(layer.context.last.layers[LAYER].weights[0].double())
    rows = torch.stack(found)
    numbers = json.loads((dense / "export.json").read_text())["routing"][LAYER]
    torch.testing.assert_close(torch.tensor(numbers["weights"]).double(), rows.mean(0), rtol=1e-5, atol=1e-6)
    each = -torch.xlogy(rows, rows).sum(-1).mean()
    mean = -torch.xlogy(rows.mean(0), rows.mean(0)).sum()
    assert numbers["entropy"] == pytest.approx(float(each), abs=1e-5)
    assert numbers["lost"] == pytest.approx(float(mean - each), abs=1e-5)


@torch.no_grad()
def test_the_folded_folder_computes_what_the_run_does(run, tmp_path):
    made = export(run, tmp_path / "folded", as_="folded", split="validation", rows=5)
    given = inputs(run / "model")
    expected = load(run / "model")(**given).logits
    torch.testing.assert_close(load(made.folder)(**given).logits, expected, rtol=1e-5, atol=1e-5)
    assert made.difference.largest < 1e-5 * made.difference.scale
    assert made.after == pytest.approx(made.before, abs=1e-5)
    assert made.parameters[1] < made.parameters[0]
    assert (made.split, made.rows) == ("validation", 5)
    assert any(line.startswith("validation_loss") for line in lines(made))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"as_": "desne"}, "--as: unknown 'desne'. Did you mean 'dense'"),
        ({"split": "test"}, "--split: unknown 'test'"),
        ({"rows": 0}, "--rows: expected at least 1"),
    ],
)
def test_options_are_checked_first(run, tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        export(run, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(run, tmp_path):
    (tmp_path / "mine").write_text("notes")
    with pytest.raises(UserError, match="is there already"):
        export(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is there already"):
        export(run, tmp_path / "link")


@pytest.mark.parametrize("name", ["a" * 300, "a" * 250, "a\0b", "notes/below", "notes"])
def test_a_name_that_cannot_be_written(name, tmp_path):
    """Before anything is measured; 250 letters fit, but not what it is called until it is whole."""
    (tmp_path / "notes").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written|is there already"):
        exporting.check_target(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_what_is_no_run(run, tmp_path):
    with pytest.raises(UserError, match=r"no finished run here\. Runs are"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match=rf"no finished run here\. Did you mean {run}"):
        export(run / "model", tmp_path / "out")
    with pytest.raises(UserError, match=f"is not a checkpoint folder.*did you mean {run / 'model'}"):
        load(run)
    bare = shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match="its tokenizer is not usable"):
        export(bare, tmp_path / "out")
    shutil.rmtree(bare / "model")
    with pytest.raises(UserError, match="has no model"):
        export(bare, tmp_path / "out")


def test_an_export_that_fails_leaves_nothing(exported, tmp_path, monkeypatch):
    def write() -> None:
        model, tokenizer = load(exported.folder), AutoTokenizer.from_pretrained(exported.folder)
        there = replace(exported, folder=tmp_path / "out")
        exporting.write(model, tokenizer, there, task=TASKS.get("glue/rte"), license=None)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "numbers", full)
    with pytest.raises(UserError, match="no room"):
        write()
    assert list(tmp_path.iterdir()) == []

    def late(made: object) -> dict:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("of somebody else, written meanwhile")
        return {}

    monkeypatch.setattr(exporting, "numbers", late)
    with pytest.raises(UserError, match="is there already"):
        write()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "out"]


def test_changes_that_round_to_nothing_have_no_minus():
    assert [_change(1.0, one) for one in (0.99999999, 1.0, 0.9999, 1.2)] == [
        "+0.0000",
        "+0.0000",
        "-0.0001",
        "+0.2000",
    ]


@pytest.mark.slow
def test_the_dense_folder_needs_no_camex_ft(dense, tmp_path):
    """In a process that cannot import the package: the same logits, bit for bit."""
    given = inputs(dense)
    save_file(given, tmp_path / "inputs.safetensors")
    code = f"""
import sys
sys.modules["camex_ft"] = None  # as if it were not installed
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({str(dense)!r}).eval()
given = load_file({str(tmp_path / "inputs.safetensors")!r})
with torch.no_grad():
    save_file({{"logits": model(**given).logits}}, {str(tmp_path / "logits.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = load(dense)(**given).logits
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)
