"""Language modelling from end to end, on a few lines: pre-training, fine-tuning with experts from it, and its use."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from camex_ft.config import Config, load_config
from camex_ft.results import Record, summary_rows
from camex_ft.run import inference, pipeline
from camex_ft.tasks import lm
from camex_ft.upcycling import expert_layers, load
from camex_ft.utils.errors import UserError

LINES = [
    " = A title = \n",
    "",
    " It was a dark and stormy night , and it was cold . \n",
    " It was not her day . \n",
]
SETTINGS: dict[str, Any] = {
    "backbone": "embedded/gpt2",
    "task": {"suite": "lm", "name": "text", "block_size": 16, "stride": 4},
    "merging": {"protocol": "dense", "experts": 2},
    "routing": {"segment": 8},
    "training": {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1.0,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "use_cpu": True,
    },
}


class Run(NamedTuple):
    record: Record
    folder: Path
    said: str


def settings(output: Path, **changes: Any) -> Config:
    values = {**SETTINGS, "output": {"dir": str(output)}}
    for key, change in changes.items():
        values[key] = {**values.get(key, {}), **change} if isinstance(change, dict) else change
    output.mkdir(parents=True, exist_ok=True)
    file = output / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return load_config(str(file), [])


def run(output: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> Run:
    record = pipeline.run(settings(output, **changes))
    return Run(record, output / "runs" / record.run.name, capsys.readouterr().out)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the text to train on, as one split, and the other half."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("validation", "test"):
        (folder / f"{name}.txt").write_text(lm.stream_text(LINES * 12) + f"the {name} file\n")
    return folder


@pytest.fixture(scope="module")
def pretrained(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("results")
    data = {"dir": str(texts), "splits": {"train": "validation", "validation": "test"}}
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "say", said.append)
        record = pipeline.run(settings(output, data=data))
    return Run(record, output / "runs" / record.run.name, "\n".join(said))


def test_a_tokenizer_is_made_for_the_text_and_told_of(pretrained: Run) -> None:
    made = pretrained.record.model.tokenizer
    assert made is not None and made.startswith("a byte-level BPE of ")
    assert made.endswith(" tokens, trained on the train split") and made in pretrained.said
    tokenizer = AutoTokenizer.from_pretrained(pretrained.folder / "model")
    text = " It was ŋever 日本 <|pad|>\n"
    assert (
        tokenizer.decode(tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"])
        == text
    )


def test_the_record_is_of_a_text(pretrained: Run) -> None:
    record = pretrained.record
    metrics, scores = record.metrics, [row["validation_perplexity"] for row in record.metrics.per_epoch]
    assert (metrics.primary, metrics.greater_is_better) == ("perplexity", False)
    assert metrics.best == min(scores) and metrics.last == scores[-1] < scores[0]
    assert metrics.all["perplexity"] == pytest.approx(metrics.best, rel=1e-5)
    assert metrics.all["perplexity"] == pytest.approx(math.exp(metrics.all["loss"]))
    assert set(metrics.all) == {"perplexity", "word_perplexity", "bits_per_byte", "loss"}
    assert metrics.test == {
        name: pytest.approx(value) for name, value in metrics.all.items()
    }  # the same file
    assert record.config["data"]["splits"] == {"train": "validation", "validation": "test"}
    assert record.data.rows == {"train": 49, "validation": 49, "test": 49}
    assert record.cost.tokens_per_second > record.cost.samples_per_second > 0
    assert "tokens a second" in dict(summary_rows(record, pretrained.folder))
    assert record.run.name.startswith("lm--text--embedded-gpt2--dense--seed42--")


def test_a_model_with_experts_starts_from_the_pretrained_one(
    pretrained: Run, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two commands: the second's backbone is the first's model."""
    data = {"dir": str(texts), "splits": {"train": "validation", "validation": "test"}}
    training = {"learning_rate": 1e-12, "max_steps": 2, "warmup_steps": 0}
    given = {"backbone": str(pretrained.folder / "model"), "data": data, "training": training}
    found = run(tmp_path, capsys, merging={"protocol": "domain-ca"}, **given)
    assert found.record.metrics.best == pytest.approx(pretrained.record.metrics.best, rel=1e-4)
    assert expert_layers(load(found.folder / "model"))
    assert found.record.model.tokenizer is None and "byte-level" not in found.said
    assert found.record.run.name.startswith(f"lm--text--run-{pretrained.folder.name[-8:]}--domain-ca--")


def test_evaluate_measures_the_same(pretrained: Run) -> None:
    found = inference.evaluate(pretrained.folder)
    for name, value in pretrained.record.metrics.all.items():
        assert found[f"validation_{name}"] == pytest.approx(value, rel=1e-5)


def test_predicting_is_refused_with_advice(pretrained: Run, texts: Path, tmp_path: Path) -> None:
    advice = r"lm/text has nothing to predict.*evaluate RUN.*generate RUN"
    with pytest.raises(UserError, match=advice):
        inference.predict(pretrained.folder, texts / "test.txt")
    with pytest.raises(UserError, match=advice):
        pipeline.run(settings(tmp_path, task={"predict": True}))
    assert not (tmp_path / "runs").exists()


# -- generate


def test_it_goes_on_from_a_text(pretrained: Run) -> None:
    model, tokenizer = inference.load_trained(pretrained.folder)
    ids = tokenizer(" It was", add_special_tokens=False, return_tensors="pt")["input_ids"]
    for _ in range(5):  # the likeliest token, five times
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert inference.generate(pretrained.folder, " It was", tokens=5) == tokenizer.decode(ids[0, -5:])


def test_draws_follow_the_seed(pretrained: Run) -> None:
    before = torch.get_rng_state()
    made = [
        inference.generate(pretrained.folder, " It", tokens=20, sample=True, seed=seed) for seed in (1, 1, 2)
    ]
    assert made[0] == made[1] != made[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert inference.generate(pretrained.folder, " It", tokens=4, beams=3)


@pytest.mark.parametrize(
    ("prompt", "tokens", "words"),
    [("", 5, "the prompt is empty"), (" It", 600, "exceeds the 512 positions.*--tokens 51")],
)
def test_a_prompt_must_fit(prompt: str, tokens: int, words: str, pretrained: Run) -> None:
    with pytest.raises(UserError, match=words):
        inference.generate(pretrained.folder, prompt, tokens=tokens)


@pytest.mark.parametrize(("family", "first"), [("gpt2", "prior"), ("llama", "prior"), ("gpt2", "self")])
def test_generation_with_experts_and_segments(
    family: str, first: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run on embedded text, which its own tokenizer reads; where a first segment routes itself, without a cache."""
    changes = {
        "backbone": f"embedded/{family}",
        "data": {"source": "embedded", "train_rows": 12, "eval_rows": 4},
        "merging": {"protocol": "ties-ca"},
        "routing": {"first_segment": first},
    }
    made = run(tmp_path, capsys, **changes)
    assert made.record.model.tokenizer is None
    assert set(made.record.routing) == set(expert_layers(load(made.folder / "model")))
    assert all(sum(layer.load) == pytest.approx(1) for layer in made.record.routing.values())
    assert isinstance(inference.generate(made.folder, "the cook went to", tokens=20), str)


def test_a_classifier_writes_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = type("Task", (), {"head": "sequence-classification", "id": "glue/sst2"})
    monkeypatch.setattr(inference, "read_run", lambda folder: (None, classifier))
    monkeypatch.setattr(inference, "load_trained", lambda folder: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"glue/sst2 is a classification task.*suite lm"):
        inference.generate("somewhere", "the cook")


# -- what is refused before any work


def test_blocks_that_the_backbone_cannot_read(texts: Path, tmp_path: Path) -> None:
    data = {"dir": str(texts), "splits": {"train": "test"}}
    with pytest.raises(UserError, match=r"task.block_size is 600; the backbone reads at most 512 tokens"):
        pipeline.run(settings(tmp_path, data=data, task={"block_size": 600}))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"block_size": 1}, "task.block_size: expected at least 2"),
        ({"block_size": 8, "stride": 8}, "less than task.block_size, which is 8, got 8"),
    ],
)
def test_windows_that_cannot_be(task: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        settings(tmp_path, task={"stride": None, **task})
    assert words in str(caught.value)


def test_splits_are_part_of_the_experiment(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A split that serves as itself is as if it had not been named."""
    names = []
    monkeypatch.setattr(
        pipeline.RunFolder, "create", lambda output, name: names.append(name) or pytest.fail("made")
    )
    for splits in (
        {"train": "validation", "validation": "test"},
        {"train": "validation", "validation": "test", "test": "test"},
        {"train": "validation", "validation": "validation"},
    ):
        with pytest.raises(pytest.fail.Exception):
            pipeline.run(settings(tmp_path, data={"dir": str(texts), "splits": splits}))
    assert names[0] == names[1] != names[2]


def test_an_interrupted_run_goes_on_with_the_same_tokenizer(
    pretrained: Run,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = {"dir": str(texts), "splits": {"train": "validation", "validation": "test"}}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "make_record", lambda *_: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            pipeline.run(settings(tmp_path, data=data))
    found = run(tmp_path, capsys, data=data)
    assert "going on from checkpoint-" in found.said
    assert found.record.metrics == pretrained.record.metrics
    history = [json.loads(line) for line in (found.folder / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 3, 4]
