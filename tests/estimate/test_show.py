"""`camex-ft plan` on the command line: its options, and what is said of a step that fits or does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from camex_ft.cli import app
from camex_ft.config import load_config
from camex_ft.estimate import plan, show
from camex_ft.estimate.measured import Measured
from camex_ft.estimate.show import PlanOptions, compare, parse_size, show_plan
from camex_ft.utils.errors import UserError

TINY = ["profile=embedded", "merging.protocol=domain-ca"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 << 30),
        ("24", 24 << 30),
        ("1.5 gb", 1_500_000_000),
        ("512MiB", 512 << 20),
        (".5GB", 5 * 10**8),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "24GX", "1e9", "many"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="is no size; expected one such as 24GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PlanOptions(gpus=2, measure=True), "leave --gpus out"),
        (PlanOptions(gpus=2, engine="zero4"), "Did you mean"),
        (PlanOptions(gpus=0), "expected at least 1, got 0"),
        (PlanOptions(memory="much"), "is no size"),
    ],
)
def test_options_at_fault(options: PlanOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        show_plan(load_config("glue", TINY), options)


def test_a_step_that_fits_and_one_that_does_not(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    arguments = [
        "plan",
        "glue",
        *TINY,
        "--gpus",
        "2",
        "--engine",
        "fsdp",
        "--tflops",
        "5",
        "--json",
        str(file),
    ]
    fits = CliRunner().invoke(app, [*arguments, "--memory", "4GiB"])
    assert fits.exit_code == 0, fits.output
    assert "\nfits: a step takes" in fits.output
    assert "2 processes (fsdp), figures of each" in fits.output
    assert "5 TFLOP/s assumed; sending at 10 GB/s" in fits.output
    written = json.loads(file.read_text())
    assert written["advice"]["limit"] == 4 << 30
    assert written["setting"]["where"]["engine"] == {"name": "fsdp", "processes": 2}
    tight = CliRunner().invoke(app, [*arguments, "--memory", "590MiB"])
    assert tight.exit_code == 0, tight.output
    assert "does not fit: a step takes" in tight.output
    assert "training.activation_checkpointing=true" in tight.output
    none = CliRunner().invoke(app, [*arguments, "--memory", "1MiB"])
    assert "all of these together are not enough" in none.output


def test_measured_beside_planned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = load_config("glue", TINY)
    own = plan(given, tflops=1.0).own
    assert own is not None

    def measure(settled: object) -> Measured:
        return Measured(parameters=own.parameters, peak=10**9, framework=5 * 10**8, seconds=0.5, steps=3)

    monkeypatch.setattr(show, "measure", measure)
    show_plan(given, PlanOptions(measure=True, tflops=1.0))
    shown = capsys.readouterr().out
    assert "measured here, domain-ca: 3 optimizer steps" in shown
    assert "peak memory  0.93 GiB, planned" in shown
    assert "a step       500.00 ms; its matrix products alone are estimated at" in shown


def test_on_a_gpu_the_framework_is_not_told_apart() -> None:
    made = plan(load_config("glue", TINY), tflops=1.0)
    own = made.own
    assert own is not None
    lines = compare(
        made, Measured(parameters=own.parameters, peak=1 << 30, framework=0, seconds=1.0, steps=3)
    )
    assert not any("without the framework" in line for line in lines)
