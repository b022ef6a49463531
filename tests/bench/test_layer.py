"""`camex-ft bench layer`: that it compares like with like, and what it prints and keeps."""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from camex_ft import cli
from camex_ft.bench import layer, settings
from camex_ft.bench.layer import bench_layer, make
from camex_ft.bench.settings import LayerBench
from camex_ft.cli.bench import FOLDER
from camex_ft.moe.curvature import distance_from_identity
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import PROTOCOLS

MERGING = [name for name in PROTOCOLS.names() if PROTOCOLS.get(name).form == "weights"]
FIGURES = {
    *("dense_s", "plain_s", "merged_s", "ratio_plain", "ratio_dense"),
    *("peak_extra_mb_plain", "peak_extra_mb_merged"),
}
TINY: dict[str, Any] = {
    "batch": 2,
    "length": 3,
    "in_features": 6,
    "out_features": 8,
    "experts": 3,
    "repeats": 3,
}


def tiny(**given: Any) -> LayerBench:
    return LayerBench(**{**TINY, **given})


@pytest.fixture
def at_once(monkeypatch):
    """Measure memory in this process: what a process of its own adds is tested with it."""
    monkeypatch.setattr(layer, "in_child", lambda function, *given: function(*given))


# -- like with like ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("protocol", MERGING)
def test_merged_and_plain_compute_the_same(protocol, top_k):
    problem = make(tiny(protocol=protocol, dtype="float64", rank=2, top_k=top_k))
    results = []
    for name in ("merged", "plain"):
        side = layer.side(problem, layer.SIDES[name], evaluate=False)
        side.prepare()
        torch.manual_seed(7)  # of what a protocol drops
        output = layer.SIDES[name](problem)
        torch.manual_seed(7)
        side.run()
        results.append((output.detach(), [leaf.grad for leaf in problem.leaves()]))
    (merged, merged_grads), (plain, plain_grads) = results
    torch.testing.assert_close(merged, plain)
    assert sum(grad is None for grad in merged_grads) == 1  # the dense weight's
    for ours, theirs in zip(merged_grads, plain_grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("protocol", MERGING)
def test_merged_and_plain_compute_the_same_in_evaluation(protocol):
    problem = make(tiny(protocol=protocol, dtype="float64", evaluate=True))
    assert not problem.linear.training
    with torch.no_grad():
        torch.testing.assert_close(layer.merged(problem), layer.plain(problem))


@pytest.mark.parametrize("protocol", MERGING)
@pytest.mark.parametrize("evaluate", [False, True])
def test_bfloat16_goes_through_every_side(protocol, evaluate):
    problem = make(tiny(protocol=protocol, dtype="bfloat16", evaluate=evaluate))
    for forward in layer.SIDES.values():
        assert forward(problem).dtype == torch.bfloat16
        layer.side(problem, forward, evaluate=evaluate).run()


def test_the_dense_side_is_one_linear_map():
    problem = make(tiny())
    torch.testing.assert_close(layer.dense(problem), problem.x @ problem.weight.mT)


def test_experts_curvature_and_routing_are_not_as_initialised():
    problem = make(tiny(rank=2))
    linear = problem.linear
    apart = (linear.experts - linear.base).std() / linear.base.std()
    assert apart.item() == pytest.approx(0.1, rel=0.3)
    assert distance_from_identity(linear.curvature.factors).min() > 0.05
    assert layer.route(problem).std() > 0


def test_a_problem_follows_from_its_settings_alone():
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first, second = make(tiny()), make(tiny())
    assert torch.equal(state, torch.random.get_rng_state())
    for a, b in zip(first.leaves(), second.leaves(), strict=True):
        assert torch.equal(a, b)


def test_a_training_call_finds_changed_parameters_and_no_gradients():
    problem = make(tiny())
    side = layer.side(problem, layer.merged, evaluate=False)
    side.run()
    before = [(leaf._version, leaf.detach().clone()) for leaf in problem.leaves()]
    side.prepare()
    for leaf, (version, value) in zip(problem.leaves(), before, strict=True):
        assert leaf.grad is None
        assert leaf._version > version
        assert torch.equal(leaf, value)


def test_an_evaluation_call_finds_parameters_as_they_were_and_makes_no_gradients():
    problem = make(tiny(evaluate=True))
    side = layer.side(problem, layer.merged, evaluate=True)
    versions = [leaf._version for leaf in problem.leaves()]
    side.prepare()
    side.run()
    assert [leaf._version for leaf in problem.leaves()] == versions
    assert all(leaf.grad is None for leaf in problem.leaves())


# -- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("at_once")
def test_figures_follow_from_the_single_times():
    figures = bench_layer(tiny())
    assert set(figures) == FIGURES | {"times"}
    times = figures["times"]
    assert list(times) == ["dense", "merged", "plain"]
    assert {len(each) for each in times.values()} == {3}
    for name, each in times.items():
        assert figures[f"{name}_s"] == statistics.median(each) > 0
    assert figures["ratio_plain"] == figures["plain_s"] / figures["merged_s"]
    assert figures["ratio_dense"] == figures["merged_s"] / figures["dense_s"]


@pytest.mark.usefixtures("at_once")
def test_without_the_plain_formula_its_figures_are_empty():
    figures = bench_layer(tiny(skip_plain=True, evaluate=True, repeats=1))
    assert set(figures) == FIGURES | {"times"}
    assert {name for name, value in figures.items() if value is None} == {
        *("plain_s", "ratio_plain", "peak_extra_mb_plain")
    }


@pytest.mark.usefixtures("resettable")
@pytest.mark.parametrize("evaluate", [False, True])
def test_peak_memory_of_the_plain_formula_holds_its_largest_tensor(evaluate):
    given = tiny(batch=8, experts=8, in_features=128, out_features=128, protocol="smear", evaluate=evaluate)
    largest = 8 * 8 * 128 * 128 * 4 / 1e6  # [B, N, out, in]
    assert largest < layer.peak_extra_mb(given, "plain") < 10 * largest
    assert layer.peak_extra_mb(given, "merged") < largest * 2


# -- command line -----------------------------------------------------------------------------------------------------

SMALL = ["--batch", "2", "--length", "3", "--in", "6", "--out", "8", "--experts", "3", "--repeats", "2"]


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "layer", *arguments])


def test_json_is_the_record_and_nothing_else(tmp_path):
    """With processes of their own for memory, as users run it."""
    done = invoke(*SMALL, "--top-k", "2", "--json", "--save", str(tmp_path))
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert set(shown) == FIGURES | {"kind", "settings", "times", "machine"}
    (file,) = tmp_path.iterdir()
    assert file.name == "layer-ties-ca-b2-l3-6x8-n3-k2-r1-float32-cpu.json"
    assert file.read_text() == done.stdout


@pytest.mark.usefixtures("at_once")
def test_the_table_names_every_side(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = invoke(*SMALL, "--protocol", "smear").output
    rows = [line.split()[0] for line in shown.splitlines() if line]
    assert [row for row in rows if row in layer.SIDES] == list(layer.SIDES)
    assert "ratio_plain: " in shown
    assert "wrote results/measurements/layer-smear-b2-l3-6x8-n3-k3-float32-cpu.json" in shown
    assert "wrote" not in invoke(*SMALL, "--no-save", "--skip-plain").output
    assert len(list((tmp_path / "results" / "measurements").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--protocol", "tis-ca"], "Did you mean 'ties-ca'?"),
        (["--protocol", "smoe"], "the weights of one map by itself, which smoe does not"),
        (["--protocol", "dense"], "the weights of one map by itself, which dense does not"),
        (["--batch", "0"], "--batch is 0: expected at least 1"),
        (["--in", "-1"], "--in is -1"),
        (["--top-k", "0"], "--top-k is 0"),
        (["--top-k", "9"], "--top-k is 9: expected at most 8"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--dtype", "bfloat"], "Did you mean 'bfloat16'?"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--device", "cuda"], "no CUDA device"),
    ],
    ids=" ".join,
)
def test_bad_input_is_a_user_error(arguments, words, monkeypatch):
    monkeypatch.setattr(settings, "cuda_is_there", lambda: False)
    monkeypatch.setattr(layer, "bench_layer", lambda _: pytest.fail("measured"))
    error = invoke(*arguments, "--no-save").exception
    assert isinstance(error, UserError)
    assert words in str(error)


def test_a_folder_that_cannot_be_written_is_found_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(layer, "bench_layer", lambda _: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    assert isinstance(invoke("--save", str(tmp_path / "file")).exception, UserError)


@pytest.mark.parametrize(
    "path",
    [
        "results/measurements/x.json",
        "results/runs/x/record.json",
        "results/comparisons/x/table.md",
        "results/report.html",
        "results/verify.md",
        "results/lm-eval/x.yaml",
    ],
)
def test_what_commands_write_by_default_is_not_tracked(path):
    """Records of a user's machine do not take the place of committed ones."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    assert subprocess.run(["git", "check-ignore", "-q", path], cwd=root).returncode == 0
    assert Path(FOLDER, "x.json") == Path("results/measurements/x.json")
