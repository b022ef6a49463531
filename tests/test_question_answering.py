"""Question answering from end to end, on a few rows: the record, going on, evaluating and predicting again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from transformers import TrainerCallback

from camex_ft.config import Config, load_config
from camex_ft.results import Record
from camex_ft.run import inference, pipeline
from camex_ft.utils.errors import UserError

SETTINGS: dict[str, Any] = {
    "profile": "embedded",
    "backbone": "embedded/t5",
    "task": {"suite": "qa", "name": "squad", "max_length": 48, "doc_stride": 16, "answer_length": 4},
    "data": {"source": "embedded", "train_rows": 24, "eval_rows": 12},
    "merging": {"protocol": "ties-ca", "experts": 3, "curvature": {"rank": 1}},
    "upcycle": {"layers": "every_other"},
    "training": {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1.0,
        "learning_rate": 1e-2,
        "warmup_steps": 0.0,
        "disable_tqdm": True,
        "use_cpu": True,
    },
}


class Run(NamedTuple):
    config: Config
    record: Record
    folder: Path


class Stop(Exception):
    """What a killed process looks like from inside."""


class StopAt(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise Stop


def settings(output: Path, **task: Any) -> Config:
    values = {**SETTINGS, "task": {**SETTINGS["task"], **task}, "output": {"dir": str(output)}}
    output.mkdir(parents=True, exist_ok=True)
    (output / "run.yaml").write_text(yaml.safe_dump(values))
    return load_config(str(output / "run.yaml"), [])


def run(output: Path, **task: Any) -> Run:
    config = settings(output, **task)
    record = pipeline.run(config)
    return Run(config, record, output / "runs" / record.run.name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("squad"))


@pytest.fixture(scope="module")
def wikiqa(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("wikiqa"), name="wikiqa", predict=True)


def write(path: Path, examples: Any, columns: Any) -> Path:
    path.write_text("".join(json.dumps({c: row[c] for c in columns}) + "\n" for row in examples))
    return path


def test_the_record_has_the_measures_of_squad(whole: Run) -> None:
    metrics = whole.record.metrics
    assert whole.record.task == "qa/squad"
    assert metrics.primary == "exact_match"
    assert {"exact_match", "f1", "loss"} <= set(metrics.all)
    assert all(0 <= metrics.all[name] <= 1 for name in ("exact_match", "f1"))
    assert len(metrics.per_epoch) == 2
    assert metrics.best == max(row["validation_exact_match"] for row in metrics.per_epoch)


def test_routing_is_known_for_every_layer_of_both_stacks(whole: Run) -> None:
    assert {name.split(".")[0] for name in whole.record.routing} == {"encoder", "decoder"}
    for layer in whole.record.routing.values():
        assert sum(layer.load) == pytest.approx(1)
        assert layer.nmi is not None  # windows know the domain of their row


def test_a_run_goes_on_where_it_stopped(whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = pipeline.make_trainer

    def stopping(*args: Any, **kwargs: Any) -> Any:
        trainer = make(*args, **kwargs)
        trainer.add_callback(StopAt())
        return trainer

    monkeypatch.setattr(pipeline, "make_trainer", stopping)
    with pytest.raises(Stop):
        run(tmp_path)
    monkeypatch.setattr(pipeline, "make_trainer", make)
    again = run(tmp_path)
    assert again.record.metrics == whole.record.metrics
    assert again.record.routing == whole.record.routing


def test_evaluate_measures_the_same(whole: Run) -> None:
    found = inference.evaluate(whole.folder)
    for name in ("exact_match", "f1"):
        assert found[f"validation_{name}"] == whole.record.metrics.all[name]
    assert found["validation_loss"] == pytest.approx(whole.record.metrics.all["loss"], rel=1e-6)


def test_predict_writes_an_answer_to_every_question_of_a_file(whole: Run, tmp_path: Path) -> None:
    settled, task = inference.read_run(whole.folder)
    examples = pipeline.load_splits(settled, task)["validation"]
    file = write(tmp_path / "mine.jsonl", examples, ["id", "title", "context", "question"])  # without answers
    target = inference.predict(whole.folder, file)
    assert target == whole.folder / "predictions" / "mine.json"
    found = json.loads(target.read_text())
    assert list(found) == examples["id"][:]
    assert all(isinstance(answer, str) for answer in found.values())


def test_the_predictions_of_a_file_score_what_the_run_scored(whole: Run, tmp_path: Path) -> None:
    from camex_ft.tasks.metrics import SquadAnswers

    settled, task = inference.read_run(whole.folder)
    examples = pipeline.load_splits(settled, task)["validation"]
    found = json.loads(
        inference.predict(whole.folder, write(tmp_path / "x.jsonl", examples, task.features)).read_text()
    )
    scores = SquadAnswers().compute(
        predictions=[found[row["id"]] for row in examples],
        references=[row["answers"]["text"] for row in examples],
    )
    assert scores == {name: whole.record.metrics.all[name] for name in ("exact_match", "f1")}


def test_squad_has_no_test_split_to_predict(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="qa/squad has no test split here"):
        run(tmp_path, predict=True)


def test_version_2_measures_both_kinds_of_question(tmp_path: Path) -> None:
    found = run(tmp_path, name="squad_v2", beams=2).record
    for part in ("", "has_answer_", "no_answer_"):
        assert {f"{part}exact_match", f"{part}f1"} <= set(found.metrics.all)


def test_wikiqa_ranks_sentences_and_predicts_its_test_split(wikiqa: Run) -> None:
    metrics = wikiqa.record.metrics
    assert metrics.primary == "accuracy"
    assert {"accuracy", "f1", "map", "mrr"} <= set(metrics.all)
    assert metrics.test is not None
    assert set(metrics.test) >= {"accuracy", "map", "mrr"}
    lines = (wikiqa.folder / "predictions" / "WikiQA.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["question_id", "sentence", "label", "score"]
    rows = [line.split("\t") for line in lines[1:]]
    assert len(rows) == wikiqa.record.data.rows["test"]
    assert {row[1] for row in rows} == {"0", "1", "2", "3"}
    assert all((float(row[3]) > 0) == (row[2] == "1") for row in rows)


def test_wikiqa_evaluates_and_predicts_a_file_the_same(wikiqa: Run, tmp_path: Path) -> None:
    found = inference.evaluate(wikiqa.folder)
    assert found["validation_map"] == wikiqa.record.metrics.all["map"]
    settled, task = inference.read_run(wikiqa.folder)
    file = write(tmp_path / "x.jsonl", pipeline.load_splits(settled, task)["test"], task.columns)
    said = inference.predict(wikiqa.folder, file).read_text()
    assert said == (wikiqa.folder / "predictions" / "WikiQA.tsv").read_text()


def test_a_backbone_that_cannot_answer_in_text_is_refused(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with pytest.raises(UserError, match="has no head 'seq2seq-lm'"):
        pipeline.run(config.model_copy(update={"backbone": "embedded/bert"}))
