"""Times of sides in turns, and records of benchmarks."""

from __future__ import annotations

import json
import platform

import pytest
import torch
from typer.testing import CliRunner

from camex_ft import cli
from camex_ft.bench import measurement
from camex_ft.bench.settings import LayerBench, StepBench
from camex_ft.utils.errors import UserError

# -- times ------------------------------------------------------------------------------------------------------------


def test_sides_are_warmed_up_and_then_timed_in_turns():
    calls: list[str] = []
    sides = {
        name: measurement.Side(
            run=lambda name=name: calls.append(name),
            prepare=lambda name=name: calls.append(f"prepare {name}"),
        )
        for name in ("a", "b", "c")
    }
    times = measurement.alternate(sides, repeats=2, device="cpu")
    assert calls == ["prepare a", "a", "prepare b", "b", "prepare c", "c"] * 3
    assert {name: len(each) for name, each in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_time_is_that_of_the_call_without_what_prepares_it(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measurement.time, "perf_counter", lambda: clock[0])
    durations = iter([9.0, 1.0, 3.0, 2.0])  # the first warms up

    def spend(seconds):
        clock[0] += seconds

    side = measurement.Side(run=lambda: spend(next(durations)), prepare=lambda: spend(100.0))
    times = measurement.alternate({"side": side}, repeats=3, device="cpu")
    assert times == {"side": [1.0, 3.0, 2.0]}
    assert measurement.medians(times) == {"side": 2.0}


# -- records ----------------------------------------------------------------------------------------------------------


def test_a_record_has_the_settings_the_figures_and_the_machine():
    settings = LayerBench(protocol="domain", experts=4, in_features=8)
    made = measurement.make_record(
        settings, {"dense_s": 0.123456, "times": {"dense": [0.123456, 2.0]}, "plain_s": None}
    )
    assert made["kind"] == "layer"
    assert made["settings"]["in"] == 8
    assert (made["settings"]["top_k"], made["settings"]["rank"]) == (4, 0)  # as they take effect
    assert (made["dense_s"], made["plain_s"], made["times"]) == (0.1235, None, {"dense": [0.1235, 2.0]})
    assert set(made["machine"]) == {"processor", "cores", "threads", "memory_gb", "torch", "gpu"}
    assert made["machine"]["processor"]
    assert made["machine"]["torch"] == torch.__version__


def test_a_record_is_json_that_tells_nothing_private(tmp_path):
    settings = StepBench(backbone="embedded/t5")
    made = measurement.make_record(settings, {"step_s": 1.0})
    measurement.make_folder(tmp_path / "bench")
    path = measurement.save(made, settings.name(), tmp_path / "bench")
    text = path.read_text()
    assert json.loads(text) == made
    assert platform.node() not in made["machine"].values()
    assert str(tmp_path) not in text


def test_the_processor_is_named(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("vendor_id : x\nmodel name\t: AMD EPYC 9R14\n")
    assert measurement.processor(file) == "AMD EPYC 9R14"
    file.write_text("Features : fp\n")
    assert measurement.processor(file)


def test_settings_that_differ_have_records_of_their_own():
    layers = [
        LayerBench(),
        LayerBench(batch=2),
        LayerBench(length=2),
        LayerBench(in_features=2),
        LayerBench(out_features=2),
        LayerBench(experts=2),
        LayerBench(top_k=2),
        LayerBench(rank=2),
        LayerBench(curvature="diagonal"),
        LayerBench(protocol="ties"),
        LayerBench(dtype="float64"),
        LayerBench(evaluate=True),
        LayerBench(skip_plain=True),
    ]
    names = [made.name() for made in [*layers, StepBench(), StepBench(backbone="embedded/t5")]]
    assert names[0] == "layer-ties-ca-b16-l128-768x3072-n8-k8-r1-float32-cpu"
    assert names[-1] == "step-ties-ca-embedded-t5-b8-l128-n8-k8-r1-float32-cpu"
    assert len(set(names)) == len(names)
    plain = LayerBench(protocol="ties")
    assert LayerBench(protocol="ties", rank=2, curvature="low-rank").name() == plain.name()


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--save: .*file' cannot be written"):
        measurement.make_folder(tmp_path / "file")


# -- command line -----------------------------------------------------------------------------------------------------


def test_both_benchmarks_are_listed():
    assert " bench " in CliRunner().invoke(cli.app, ["--help"]).output
    shown = CliRunner().invoke(cli.app, ["bench", "--help"]).output
    assert " layer " in shown
    assert " step " in shown
