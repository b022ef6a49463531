"""Trackers write to the run's folder of logs, which stays; without a network."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from camex_ft.results import RunFolder
from camex_ft.run import inference, pipeline
from camex_ft.training.callbacks.reporting import VARIABLES, logging_to
from tests.helpers.task_runs import configuration

OFFLINE = {
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "TRACKIO_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not importlib.util.find_spec(package), reason=f"needs {package}")


def run(folder: Path, *overrides: str, force: bool = False) -> RunFolder:
    settled = configuration("classification", f"output.dir={folder}", *overrides)
    record = pipeline.run(settled, force=force)
    return RunFolder(folder / "runs" / record.run.name)


def events(logs: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars of all event files, by tag: steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(logs.glob("**/events.out.tfevents.*")):
        read = EventAccumulator(str(file))
        read.Reload()
        for tag in read.Tags()["scalars"]:
            found.setdefault(tag, []).extend((each.step, each.value) for each in read.Scalars(tag))
    return found


@needs("tensorboard")
def test_tensorboard_logs_stay_in_the_run_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run(tmp_path / "out", "training.report_to=tensorboard")
    assert {p.name for p in folder.path.iterdir()} == {
        "record.json",
        "config.yaml",
        "history.jsonl",
        "logs",
        "model",
    }
    found = events(folder.logs / "tensorboard")
    logged = [(line["step"], line["loss"]) for line in folder.read_history() if "loss" in line]
    assert [step for step, _ in found["train/loss"]] == [step for step, _ in logged] == [1, 2]
    assert [value for _, value in found["train/loss"]] == pytest.approx(
        [loss for _, loss in logged], rel=1e-6
    )
    assert "eval/validation_accuracy" in found and "train/routing_entropy" in found
    assert any("final_validation_accuracy" in tag for tag in found)  # measured when training is over

    before = sorted(folder.logs.rglob("*"))
    inference.evaluate(folder.path)  # is not the run, and told to nobody
    assert run(tmp_path / "out", "training.report_to=tensorboard").logs == folder.logs  # done already
    assert sorted(folder.logs.rglob("*")) == before
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    assert not [name for name in VARIABLES if name in os.environ]

    again = run(tmp_path / "out", "training.report_to=tensorboard", force=True)
    assert len(list(again.logs.rglob("events.out.tfevents.*"))) == len(
        [path for path in before if "tfevents" in path.name]
    )


@needs("tensorboard")
def test_a_tracker_changes_nothing(tmp_path: Path) -> None:
    tracked, plain = run(tmp_path / "a", "training.report_to=tensorboard"), run(tmp_path / "b")
    assert tracked.path.name == plain.path.name and not plain.logs.exists()
    files = [folder.path / "model" / "model.safetensors" for folder in (tracked, plain)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tracker", "left"),
    [
        pytest.param("wandb", "wandb/offline-run-*", marks=needs("wandb")),
        pytest.param("mlflow", "mlflow.db", marks=needs("mlflow")),
        pytest.param("trackio", "trackio/*", marks=needs("trackio")),
        pytest.param("codecarbon", "emissions.csv", marks=needs("codecarbon")),
        pytest.param("dvclive", "dvclive/*", marks=needs("dvclive")),
    ],
)
def test_other_trackers_do_so_too(
    tracker: str, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    folder = run(tmp_path / "out", f"training.report_to={tracker}")
    assert list(folder.logs.glob(left)), sorted(folder.logs.rglob("*"))
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_what_the_user_has_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    with logging_to(tmp_path / "logs", ["wandb"]):
        assert os.environ["WANDB_DIR"] == "elsewhere"
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "logs" / "tensorboard")
    assert os.environ["WANDB_DIR"] == "elsewhere" and "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_without_trackers_there_is_no_folder(tmp_path: Path) -> None:
    with logging_to(tmp_path / "logs", []):
        assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    assert not (tmp_path / "logs").exists()
