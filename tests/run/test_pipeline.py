"""One way through, end to end, on a few rows: the record, what is not done twice, interruptions, faults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from transformers import TrainerCallback

from camex_ft.config import Config, load_config
from camex_ft.data import sources
from camex_ft.results import Record, load_record
from camex_ft.run import inference, pipeline
from camex_ft.upcycling import expert_layers, load
from camex_ft.utils.errors import UserError

SETTINGS: dict[str, Any] = {
    "profile": "embedded",
    "backbone": "embedded/bert",
    "task": {"suite": "glue", "name": "rte", "max_length": 48, "predict": True},
    "data": {"source": "embedded", "train_rows": 32, "eval_rows": 24},
    "merging": {"protocol": "ties-ca", "experts": 3, "top_k": 2, "curvature": {"rank": 1}},
    "upcycle": {"layers": [1]},
    "training": {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1.0,
        "learning_rate": 1e-2,
        "warmup_steps": 0.0,  # the best epoch may be the first: curvature moves from the second step on
        "disable_tqdm": True,
        "use_cpu": True,
    },
}
STEPS, EXPERTS = 6, 3
LAYER = "bert.encoder.layer.1.intermediate"


class Stop(Exception):
    """What a killed process looks like from inside."""


class Run(NamedTuple):
    config: Config
    record: Record
    folder: Path


def settings(output: Path, **changes: dict[str, Any]) -> Config:
    """The configuration, read from a file as a user's is."""
    values = {**SETTINGS, "output": {"dir": str(output)}}
    values |= {key: {**values.get(key, {}), **change} for key, change in changes.items()}
    output.mkdir(parents=True, exist_ok=True)
    file = output / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return load_config(str(file), [])


def folder_of(output: Path) -> Path:
    (folder,) = (output / "runs").iterdir()
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run from beginning to end."""
    output = tmp_path_factory.mktemp("results")
    config = settings(output)
    return Run(config, pipeline.run(config), folder_of(output))


@pytest.fixture
def done(whole: Run, tmp_path: Path) -> Run:
    """A copy of the run's folder, to be changed."""
    folder = shutil.copytree(whole.folder, tmp_path / "runs" / whole.folder.name)
    return Run(settings(tmp_path), whole.record, Path(folder))


# -- the record


def test_the_record_is_what_was_returned(whole: Run) -> None:
    assert load_record(whole.folder) == whole.record


def test_the_record_says_what_was_run(whole: Run) -> None:
    found = whole.record
    assert (found.run.status, found.run.exit, found.run.profile) == ("done", 0, "embedded")
    assert found.run.name == whole.folder.name
    assert found.run.name.startswith("glue--rte--embedded-bert--ties-ca--seed42--")
    assert found.run.seconds > 0 and found.run.started.endswith("+00:00")
    assert (found.task, found.protocol, found.backbone, found.seed) == (
        "glue/rte",
        "ties-ca",
        "embedded/bert",
        42,
    )
    assert found.config["merging"]["experts"] == EXPERTS
    assert found.data.rows == {"train": 32, "validation": 24, "test": found.data.rows["test"]}
    assert len(found.data.sha256) == 64 and found.data.source == "embedded"
    assert found.cost.samples_per_second > 0 and found.cost.peak_memory_mb > 0
    last = found.metrics.per_epoch[-1]
    assert (found.cost.steps, found.cost.epochs) == (last["step"], last["epoch"])
    assert found.cost.rows == found.cost.steps * found.cost.rows_a_step
    assert "torch" in found.environment.versions


def test_the_record_holds_no_path_of_this_machine(whole: Run) -> None:
    text = (whole.folder / "record.json").read_text()
    assert str(whole.folder.parent.parent) not in text and str(Path.home()) + "/" not in text


def test_metrics_follow_the_evaluations(whole: Run) -> None:
    found = whole.record.metrics
    assert found.primary == "accuracy"
    assert [row["step"] for row in found.per_epoch] == [2, 4, 6]
    scores = [row["validation_accuracy"] for row in found.per_epoch]
    assert found.best == max(scores) and found.last == scores[-1]
    best = found.per_epoch[scores.index(max(scores))]
    assert found.best_epoch == best["epoch"]
    assert found.all["accuracy"] == found.best  # the model that is kept is that of the best evaluation
    assert found.all["loss"] == pytest.approx(best["validation_loss"], rel=1e-6)
    assert found.test is None  # its labels are withheld, as the benchmark's are


def test_routing_and_curvature_of_every_layer(whole: Run) -> None:
    assert set(whole.record.routing) == set(whole.record.curvature) == {LAYER}
    routing, curvature = whole.record.routing[LAYER], whole.record.curvature[LAYER]
    assert len(routing.load) == EXPERTS and sum(routing.load) == pytest.approx(1)
    assert routing.entropy >= 0 and 0 <= routing.nmi <= 1  # the embedded corpus knows its domains
    assert len(curvature.distance) == EXPERTS and min(curvature.distance) > 0
    assert len(curvature.condition) == EXPERTS and min(curvature.condition) >= 1


def test_the_history_has_a_line_a_step_and_evaluation(whole: Run) -> None:
    lines = [json.loads(line) for line in (whole.folder / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval_validation_accuracy" in line] == [2, 4, 6]
    assert all("routing_entropy" in line for line in lines if "loss" in line)


def test_what_a_run_leaves_behind(whole: Run) -> None:
    left = {p.name for p in whole.folder.iterdir()}
    assert left == {"record.json", "config.yaml", "history.jsonl", "model", "predictions"}
    assert list(expert_layers(load(whole.folder / "model"))) == [LAYER]
    assert load(whole.folder / "model").config.id2label == {0: "entailment", 1: "not_entailment"}


def test_the_configuration_left_behind_runs_again(whole: Run) -> None:
    again = load_config(str(whole.folder / "config.yaml"), [])
    assert pipeline.resolve(again)[0] == pipeline.resolve(whole.config)[0]


# -- evaluate and predict


def test_evaluate_measures_the_same(whole: Run) -> None:
    found = inference.evaluate(whole.folder)
    expected = whole.record.metrics.all
    assert found["validation_accuracy"] == expected["accuracy"]
    assert found["validation_loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_predict_predicts_the_same(whole: Run, tmp_path: Path) -> None:
    """The submission of the run's own test split, and predictions for the same rows from a file."""
    submission = whole.folder / "predictions" / "RTE.tsv"
    settled, task = inference.read_run(whole.folder)
    examples = pipeline.load_splits(settled, task)["test"]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({c: row[c] for c in task.columns}) + "\n" for row in examples))
    assert inference.predict(whole.folder, file, tmp_path / "out.tsv") == tmp_path / "out.tsv"
    lines = submission.read_text().splitlines()
    assert (tmp_path / "out.tsv").read_text().splitlines() == lines
    assert lines[0] == "index\tprediction" and len(lines) == len(examples) + 1


def test_predictions_go_into_the_run_s_folder_and_have_the_files_numbers(done: Run, tmp_path: Path) -> None:
    settled, task = inference.read_run(done.folder)
    rows = pipeline.load_splits(settled, task)["test"].select([0, 1])
    file = tmp_path / "mine.tsv"
    lines = [
        ["index", *task.columns],
        *([100 + i, *map(row.get, task.columns)] for i, row in enumerate(rows)),
    ]
    file.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines))
    target = done.folder / "predictions" / "mine.tsv"
    assert inference.predict(done.folder, file) == target
    assert [line.split("\t")[0] for line in target.read_text().splitlines()] == ["index", "100", "101"]


@pytest.mark.parametrize("call", [inference.evaluate, lambda folder: inference.predict(folder, "x.jsonl")])
def test_there_must_be_a_finished_run(call: Any, done: Run) -> None:
    (done.folder / "record.json").unlink()
    with pytest.raises(UserError, match="no finished run here"):
        call(done.folder)


def test_a_file_that_is_not_there_is_named_before_a_model_is_loaded(
    whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "load_trained", lambda folder: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        inference.predict(whole.folder, "nowhere.jsonl")


# -- what is not done twice


def test_a_run_that_is_done_is_shown_and_not_repeated(
    done: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "load_model", lambda *_: pytest.fail("built a model"))
    assert pipeline.run(done.config) == done.record
    shown = capsys.readouterr().out
    assert "is done already; --force (make: FORCE=1) runs it again" in shown
    assert "accuracy" in shown


def test_force_repeats_it_from_nothing_and_the_model_is_kept_only_where_wanted(
    done: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (done.folder / "left over").write_text("")
    output = done.config.output.model_copy(update={"model": False})
    again = pipeline.run(done.config.model_copy(update={"output": output}), force=True)
    assert again.run.seconds != done.record.run.seconds
    assert again.metrics == done.record.metrics  # the same seed
    assert not (done.folder / "left over").exists()
    assert not (done.folder / "model").exists()
    with pytest.raises(UserError, match="has no model"):
        inference.evaluate(done.folder)
    assert pipeline.run(done.config) == again
    assert "is done already, but its model was not kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes", [{"data": {"eval_rows": 23}}, {"training": {"seed": 1}}, {"merging": {"alpha": 0.5}}]
)
def test_another_experiment_is_another_run(
    changes: dict[str, Any], done: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_: Any) -> None:
        raise Stop

    monkeypatch.setattr(pipeline, "load_model", built)
    with pytest.raises(Stop):
        pipeline.run(settings(tmp_path, **changes))


# -- interruptions


class StopAt(TrainerCallback):
    """Stops a run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Stop


def same_results(found: Record, expected: Record) -> None:
    assert found.metrics == expected.metrics
    assert found.routing == expected.routing and found.curvature == expected.curvature
    assert found.run.name == expected.run.name and found.data == expected.data


def test_a_run_killed_in_training_goes_on(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path)
    with pytest.raises(Stop):
        pipeline.run(config, callbacks=[StopAt(5)])
    folder = folder_of(tmp_path)
    assert not (folder / "record.json").exists()
    cut_short = folder / "checkpoints" / "checkpoint-4" / "model.safetensors"
    cut_short.write_bytes(cut_short.read_bytes()[:1000])
    found = pipeline.run(config)
    said = capsys.readouterr().out
    assert "checkpoint-4 is passed over: its model.safetensors cannot be read" in said
    assert "going on from checkpoint-2" in said
    same_results(found, whole.record)
    assert whole.record.run.resumed is None and found.run.resumed == 2


def test_a_run_killed_before_its_record_goes_on(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*_: Any) -> None:
        raise Stop

    config = settings(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "make_record", killed)
        with pytest.raises(Stop):
            pipeline.run(config)
    folder = folder_of(tmp_path)
    assert not (folder / "record.json").exists() and (folder / "checkpoints").is_dir()
    found = pipeline.run(config)
    assert (
        "going on from checkpoint-" in capsys.readouterr().out
    )  # the best or the last one, as the Trainer keeps them
    same_results(found, whole.record)
    steps = [json.loads(line)["step"] for line in (folder / "history.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps.count(1) == 1


# -- faults


def test_a_result_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load_model", lambda *_: pytest.fail("built a model"))
    config = settings(tmp_path / "there")
    (tmp_path / "there" / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"output.dir: .* cannot be written"):
        pipeline.run(config)


def test_a_loss_that_is_not_finite_leaves_no_record(tmp_path: Path) -> None:
    config = settings(
        tmp_path, training={"learning_rate": 1e30, "max_grad_norm": 1e30, "lr_scheduler_type": "constant"}
    )
    with pytest.raises(UserError, match="training loss was NaN or infinite at step"):
        pipeline.run(config)
    assert not (folder_of(tmp_path) / "record.json").exists()


def test_training_arguments_are_checked_before_a_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "load_model", lambda *_: pytest.fail("built a model"))
    config = settings(tmp_path, training={"fp16": True})
    with pytest.raises(UserError, match="fp16"):
        pipeline.run(config)


def test_a_submission_needs_a_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before a model is built, so that a forgotten test file costs no training."""
    real = sources.load
    monkeypatch.setattr(
        sources, "load", lambda *a, **k: {n: d for n, d in real(*a, **k).items() if not n.startswith("test")}
    )
    monkeypatch.setattr(pipeline, "load_model", lambda *_: pytest.fail("built a model"))
    with pytest.raises(UserError, match=r"task.predict: glue/rte has no test split"):
        pipeline.run(settings(tmp_path))
    assert not (tmp_path / "runs").exists()
