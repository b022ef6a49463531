"""The closing summary says what a user looks for, on a terminal and in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from camex_ft.results.record import Record, duration, print_summary, summary_rows

RECORD = Record.model_validate(
    {
        "run": {
            "name": "n",
            "profile": "embedded",
            "profile_reason": "profile embedded: no CUDA device",
            "status": "done",
            "started": "2026-11-21T10:00:00Z",
            "seconds": 185.0,
            "command": "camex-ft run x",
            "exit": 0,
        },
        "config": {},
        "task": "glue/mrpc",
        "protocol": "ties-ca",
        "backbone": "embedded/bert",
        "seed": 42,
        "metrics": {
            "primary": "f1",
            "best": 0.912345,
            "best_epoch": 3.0,
            "last": None,
            "per_epoch": [{"step": 30, "epoch": 3.0, "validation_f1": 0.912345}],
            "all": {"f1": 0.912345, "accuracy": 0.8},
        },
        "routing": {
            "encoder.0": {"entropy": 1.0, "load": [1.0], "nmi": 0.25},
            "encoder.1": {"entropy": 1.0, "load": [1.0], "nmi": 0.75},
        },
        "model": {"parameters": 1, "trainable": 1, "active": 1},
        "cost": {"samples_per_second": 123.45, "peak_memory_mb": 1234.5, "device": "cpu"},
        "data": {"source": "embedded", "id": "x", "rows": {}, "sha256": ""},
        "environment": {"versions": {}, "commit": None, "dirty": None, "host": "cpu-2"},
    }
)
EXPECTED = {
    "run": "glue/mrpc, embedded/bert, ties-ca, seed 42",
    "profile": "embedded (no CUDA device)",
    "best f1": "0.9123 (epoch 3)",
    "last f1": "not a number",
    "accuracy": "0.8000",
    "routing NMI": "0.250 to 0.750 over 2 layers",
    "time": "3 min 05 s",
    "samples a second": "123.5",
    "peak memory": "1,234 MB on cpu",
    "record": "runs/n/record.json",
}


def test_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dict(summary_rows(RECORD, tmp_path / "runs" / "n")) == EXPECTED


def test_no_nmi_row_without_domains():
    bare = RECORD.model_copy(update={"routing": {}})
    assert "routing NMI" not in dict(summary_rows(bare, "runs/n"))


def test_plain_lines_when_not_a_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    print_summary(RECORD, "runs/n", console=Console(file=out, width=20))
    assert out.getvalue().splitlines() == [f"{label}: {value}" for label, value in EXPECTED.items()]


def test_a_table_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    print_summary(
        RECORD, "runs/n", console=Console(file=out, width=100, force_terminal=True, color_system=None)
    )
    text = out.getvalue()
    assert all(label in text and value in text for label, value in EXPECTED.items())
    assert "│" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (60, "1 min 00 s"),
        (3599.4, "59 min 59 s"),
        (7620, "2 h 07 min"),
        (None, "unknown"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_language_model_shows_its_tokens_a_second() -> None:
    cost = RECORD.cost.model_copy(update={"tokens_per_second": 12345.6})
    record = RECORD.model_copy(update={"task": "lm/text", "cost": cost})
    rows = dict(summary_rows(record, "runs/n"))
    assert rows["tokens a second"] == "12,346"
    assert "tokens a second" not in dict(summary_rows(RECORD, "runs/n"))


def test_without_evaluations_in_training_the_final_one_is_best_and_last():
    scores = {"per_epoch": [], "last": 0.912345}
    record = RECORD.model_copy(update={"metrics": RECORD.metrics.model_copy(update=scores)})
    rows = dict(summary_rows(record, "runs/n"))
    assert rows["best f1"] == "0.9123 (the final evaluation: training had none)"
    assert rows["last f1"] == "0.9123"
