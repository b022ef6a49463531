"""Pictures: what is drawn is what was given; what is not there is said; files know when they are stale."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from camex_ft.results.entries import Entry
from camex_ft.results.plots import (
    choose,
    figures,
    is_stale,
    of_run,
    per_layer,
    png,
    save,
    series,
    source,
)
from camex_ft.results.plots.choice import slug
from camex_ft.results.plots.scores import comparison, curves, sweep
from camex_ft.results.plots.series import Series, TaskScores, swept_keys
from tests.helpers.synthetic_results import LAYERS, grid, protocols, result


def lightness(colour) -> float:
    """Relative luminance (ITU-R BT.709): what is left of a colour in grey."""
    return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))


def texts(figure: Figure) -> str:
    return "\n".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))


def drawn_lines(figure: Figure) -> dict[str, np.ndarray]:
    return {
        line.get_label(): np.asarray(line.get_ydata(), dtype=float)
        for ax in figure.axes
        for line in ax.get_lines()
    }


@pytest.mark.filterwarnings("ignore:Precision loss")
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=10))
def test_interval_is_scipys(values):
    values = np.array(values)
    middle, low, high = series.interval(values)
    found = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    # the same formula in another order of operations, which cancel for values of size 100
    np.testing.assert_allclose(
        [middle, low, high], [values.mean(), found.low, found.high], rtol=1e-9, atol=1e-9
    )


def test_interval_needs_two_values_and_skips_what_is_not_a_number():
    assert np.isnan(series.interval(np.array([1.0]))[1:]).all()
    assert series.interval(np.array([1.0, np.nan, 3.0])) == series.interval(np.array([1.0, 3.0]))
    assert np.isnan(series.interval(np.array([]))).all()


def test_series_pass_over_seeds_that_lack_a_value():
    line = Series(label="a", x=np.arange(3.0), values=np.array([[1, np.nan, np.nan], [3, 5, np.nan]]))
    np.testing.assert_array_equal(line.mean(), [2, 5, np.nan])
    np.testing.assert_allclose(line.sd(), [2**0.5, np.nan, np.nan])


def test_loss_is_gathered_by_row_and_seed():
    entries = grid(rows=protocols("dense", "ties-ca"), seeds=2, epochs=2)
    found = {s.label: s for s in series.losses(entries)}
    assert list(found) == ["dense", "ties-ca"]
    np.testing.assert_allclose(found["ties-ca"].x, np.arange(1, 21) / 10)
    expected = [[line["loss"] for line in e.result.history] for e in entries if e.row == "ties-ca"]
    np.testing.assert_array_equal(found["ties-ca"].values, expected)


def test_scores_are_in_hundredths_and_perplexities_as_they_are():
    one = grid(rows=protocols("dense"), seeds=1, epochs=1)[0].result.record
    less = result(task="lm/x", protocol="dense", seed=0, scores=[12.0], greater=False).record
    assert series.score(one, 0.5) == 50
    assert series.score(less, 12.0) == 12
    assert np.isnan(series.score(one, None))
    assert "less is better" in series.metric_label(less)


def test_the_primary_metric_is_told_from_one_whose_name_ends_alike():
    record = result(task="lm/x", protocol="dense", seed=0, scores=[12.0, 11.0], greater=False).record
    rows = [{**row, "a_word_perplexity": 40.0} for row in record.metrics.per_epoch]
    metrics = record.metrics.model_copy(update={"per_epoch": rows})
    assert series.primary_key(record.model_copy(update={"metrics": metrics})) == "validation_perplexity"


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (
            ["transformer.encoder.block.0.layer.1.X", "transformer.decoder.block.0.layer.2.X"],
            ["encoder 0", "decoder 0"],
        ),
        (["model.layers.3.mlp", "model.layers.11.mlp"], ["layer 3", "layer 11"]),
        (["a.0.b", "c.0.b"], ["a.0.b", "c.0.b"]),
        (["mlp"], ["mlp"]),
    ],
)
def test_short_names_of_layers(names, short):
    assert list(series.short_layers(names).values()) == short


@given(st.integers(1, 50), st.integers(1, 12))
def test_some_of_keeps_order_and_ends(count, most):
    found = series.some_of(list(range(count)), most)
    assert found == sorted(set(found))
    assert len(found) == min(count, most)
    assert found[0] == 0 and (most == 1 or found[-1] == count - 1)


@given(st.integers(1, 42))
def test_every_row_has_a_look_of_its_own(count):
    names = [f"r{i}" for i in range(count)]
    found = figures.looks([*names, "dense"], baseline="dense")
    assert len({(look.colour, look.marker, str(look.dashes)) for look in found.values()}) == count + 1


def test_maps_grow_lighter_with_the_value_and_tell_neighbours_apart_in_grey():
    shades = [lightness(colormaps[figures.SEQUENTIAL](x)) for x in np.linspace(0, 1, 64)]
    assert (np.diff(shades) > 0).all()


def test_curves_draw_the_mean_of_each_row():
    entries = grid(rows=protocols("dense", "ties"), seeds=3, epochs=3)
    lines = series.epoch_scores(entries)
    figure = curves(lines, title="T", x_label="epoch", y_label="accuracy", baseline="dense")
    found = drawn_lines(figure)
    for s in lines:
        np.testing.assert_allclose(found[s.label], s.values.mean(0))
    assert {"T", "epoch", "accuracy", "dense", "ties"} <= set(texts(figure).split("\n"))


def test_many_rows_get_a_panel_each():
    lines = series.epoch_scores(grid(rows=protocols("dense", "a", "b", "c"), seeds=2))
    figure = curves(lines, title="", x_label="epoch", y_label="y", baseline="dense")
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["a", "b", "c"]
    assert all("dense" in {line.get_label() for line in ax.get_lines()} for ax in figure.axes)


def test_comparison_has_the_best_on_top_and_arrows_where_an_interval_goes_on():
    scores = {
        "dense": np.array([80.0, 81.0, 82.0]),
        "good": np.array([90.0, 90.5, 91.0]),
        "wide": np.array([85, 95.0]),
    }
    panel = TaskScores(task="t", metric="m", greater=True, scores=scores)
    figure = comparison([panel], title="", baseline="dense")
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["good", "wide", "dense"]
    low, high = ax.get_xlim()
    assert low < 80 and high > 95
    assert high - low < 4 * 15  # the interval of two seeds, 90 ± 63.5, is cut
    assert {"<", ">"} <= {line.get_marker() for line in ax.get_lines()}
    assert any(np.allclose(line.get_xdata(), 81.0) and len(line.get_xdata()) == 2 for line in ax.get_lines())


def test_comparison_orders_perplexities_from_the_smallest():
    panel = TaskScores(
        task="t", metric="m", greater=False, scores={"a": np.array([30.0]), "b": np.array([20.0])}
    )
    (ax,) = comparison([panel], title="").axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "a"]


def test_comparison_of_rows_without_scores_is_drawn():
    panel = TaskScores(task="t", metric="m", greater=True, scores={"a": np.array([np.nan])})
    assert png(comparison([panel], title="", baseline="a"))


def test_sweep_draws_a_line_a_protocol_over_the_values_that_were_run():
    rows = [
        {"merging.protocol": p, "merging.curvature.rank": r}
        for p in ("ties-ca", "dare-ca")
        for r in (1, 2, 32)
    ]
    entries = grid(rows=[{"merging.protocol": "dense"}, *rows], seeds=2, epochs=1)
    assert swept_keys(entries) == ["merging.curvature.rank"]
    lines = series.sweep_lines(entries, "merging.curvature.rank")
    assert [s.label for s in lines] == ["ties-ca", "dare-ca"]
    np.testing.assert_array_equal(lines[0].x, [1, 2, 32])
    best = {(e.row, e.seed): 100 * e.result.record.metrics.best for e in entries}
    np.testing.assert_allclose(
        lines[1].values, [[best[f"dare-ca, rank {r}", seed] for r in (1, 2, 32)] for seed in (0, 1)]
    )
    figure = sweep({"t": lines}, title="", x_label="rank", y_labels={"t": "y"}, levels={"t": ("dense", 80.0)})
    (ax,) = figure.axes
    assert ax.get_xscale() == "log"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "32"]


def test_a_key_with_one_value_or_that_is_no_number_is_not_swept():
    rows = [
        {"merging.protocol": "a", "x": 1, "flag": True, "kind": "p"},
        {"merging.protocol": "b", "x": 1, "flag": False, "kind": "q"},
    ]
    assert swept_keys(grid(rows=rows, seeds=1)) == []


def test_routing_map_shows_experts_by_groups():
    entry = grid(rows=protocols("ties-ca"), seeds=1)[0]
    groups, weights = series.routing_by({"ties-ca": entry.result}, "domain")
    assert groups == ["0", "1", "2"]
    figure = per_layer.routing(weights, groups, title="", x_label="domain")
    image = figure.axes[0].images[0]
    by = entry.result.record.routing[LAYERS[0]].by["domain"]
    np.testing.assert_array_equal(image.get_array(), np.array([by["0"], by["1"], by["2"]]).T)
    assert image.get_clim()[0] == 0


def test_load_is_stacked_to_one():
    entry = grid(rows=protocols("ties"), seeds=1)[0]
    epochs, by_layer = series.load_of(entry.result)
    assert list(by_layer) == [f"encoder {i}" for i in range(3)]
    figure = per_layer.load_over_time({"ties": (epochs, by_layer)}, title="")
    np.testing.assert_allclose(figure.axes[0].get_lines()[-1].get_ydata(), 1.0)


def test_figures_leave_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    curves(series.epoch_scores(grid(rows=protocols("a"), seeds=1)), title="", x_label="", y_label="")
    assert dict(matplotlib.rcParams) == before


def test_dollar_signs_in_labels_are_no_formula():
    lines = [Series(label="$x$ and $y", x=np.arange(2.0), values=np.ones((1, 2)))]
    assert png(curves(lines, title="a $\\frac{$ b", x_label="$", y_label="$$"))


def test_all_that_applies_is_chosen_and_nothing_else():
    rows = [
        {"merging.protocol": "dense"},
        *({"merging.protocol": "ties-ca", "merging.alpha": a} for a in (0.5, 1.0)),
    ]
    made = choose(grid(rows=rows, seeds=2), title="T")
    assert list(made.figures) == [
        "comparison",
        "sweep-merging.alpha",
        *(
            f"{kind}-glue-sst2"
            for kind in ("loss", "score", "routing-domain", "routing-label", "load", "curvature")
        ),
    ]
    assert made.left_out == {}
    assert made.captions.keys() == made.figures.keys()
    assert "seed 0" in made.captions["load-glue-sst2"]


def test_what_lacks_data_is_left_out_with_its_reason():
    made = choose(grid(rows=protocols("dense", "ties"), seeds=2, epochs=1, old=True), title="T")
    assert list(made.figures) == ["comparison"]
    assert "history" in made.left_out["loss-glue-sst2"]
    assert "more than once" in made.left_out["score-glue-sst2"]
    assert "older" in made.left_out["routing-domain-glue-sst2"]
    assert "no row has a curvature" in made.left_out["curvature-glue-sst2"]


def test_layers_are_shown_of_a_seed_that_all_rows_have():
    entries = grid(rows=protocols("ties", "dare"), seeds=3, epochs=1)
    some = [e for e in entries if (e.row, e.seed) not in {("ties", 0), ("dare", 1)}]
    made = choose(some, title="T")
    assert "One run, seed 2," in made.captions["load-glue-sst2"]


def test_cells_that_have_not_run_are_passed_over():
    entries = grid(rows=protocols("dense", "ties"), seeds=2, epochs=1, old=True)
    waiting = [replace(e, result=None) if e.row == "ties" else e for e in entries]
    figure = choose(waiting, title="T").figures["comparison"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["dense"]
    nothing = choose([replace(e, result=None) for e in entries], title="T")
    assert nothing.figures == {} and "no run is done" in nothing.left_out["comparison"]
    assert choose([], title="T").figures == {}


def test_one_run_has_short_names_and_no_comparison():
    made = of_run(result(task="glue/sst2", protocol="dense", seed=1, scores=[0.5, 0.6]), title="T")
    assert list(made.figures) == ["loss", "score"]
    assert set(made.left_out) == {"routing-domain", "routing-label", "load", "curvature"}


@given(st.text())
def test_slugs_are_safe_names(text):
    assert not set(slug(text)) & set("/\\ :*?\n\0")


def test_files_know_their_source(tmp_path):
    entries = grid(rows=protocols("dense"), seeds=2, epochs=1, old=True)
    path = tmp_path / "new" / "a.png"
    assert is_stale(path, source(entries))
    save(choose(entries, title="T").figures["comparison"], path, source=source(entries))
    assert not is_stale(path, source(entries))
    assert is_stale(path, source(entries[:1]))
    other: list[Entry] = [replace(e, row="x") for e in entries]
    assert is_stale(path, source(other))
    path.write_bytes(b"no picture")
    assert is_stale(path, source(entries))


def test_the_same_picture_has_the_same_bytes_and_names_no_program():
    lines = [Series(label="a", x=np.arange(2.0), values=np.ones((1, 2)))]
    one, two = (png(curves(lines, title="", x_label="", y_label="")) for _ in range(2))
    assert one == two
    with Image.open(io.BytesIO(one)) as image:
        image.load()
        assert set(image.text) == {figures.KEY}


def test_drawing_never_imports_pyplot():
    code = (
        "import camex_ft_cli, camex_ft.results.plots, sys; from matplotlib.figure import Figure;"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "False"


def test_captions_of_one_seed_speak_of_one_seed():
    made = choose(grid(rows=protocols("dense", "ties-ca"), seeds=1), title="T")
    said = " ".join(made.captions.values())
    for word in ("mean over seeds", "band", "interval", "every epoch", "correspond"):
        assert word not in said
    assert "one seed a row" in made.captions["comparison"]
    legend = [t.get_text() for t in made.figures["comparison"].legends[0].get_texts()]
    assert legend == ["score", "one seed", "score of dense"]
    several = choose(grid(rows=protocols("dense", "ties-ca"), seeds=2), title="T").captions
    assert "the mean over seeds; the band" in several["loss-glue-sst2"]


def test_a_history_without_losses_is_not_called_missing():
    short = result(task="glue/sst2", protocol="ties-ca", seed=0, scores=[0.5, 0.6])
    lines = tuple({"step": line["step"], "epoch": line["epoch"], "eval_loss": 1.0} for line in short.history)
    made = of_run(replace(short, history=lines), title="T")
    assert made.left_out["loss"] == (
        "the history holds no training loss: none was logged in 200 steps, see training.logging_steps"
    )
    assert made.left_out["load"].startswith("the history holds no load of each expert: none was logged")
    assert of_run(replace(short, history=()), title="T").left_out["loss"].startswith("no history was saved")


def test_another_metric_never_stands_for_the_primary_one():
    plain = result(task="lm/x", protocol="dense", seed=0, scores=[12.0, 11.0], greater=False)
    rows = [{"step": 1.0, "epoch": 1.0, "validation_word_perplexity": 40.0}] * 2
    record = plain.record.model_copy(
        update={"metrics": plain.record.metrics.model_copy(update={"per_epoch": rows})}
    )
    assert series.primary_key(record) is None
    left = of_run(replace(plain, record=record), title="T").left_out
    assert left["score"] == "no record holds the deciding metric of two evaluations"


def test_every_label_is_in_the_legend_and_has_no_control_characters():
    made = choose(grid(rows=protocols("_hidden", "$x^$\x1b[1m"), seeds=2), title="T\x07", baseline="_hidden")
    figure = made.figures["loss-glue-sst2"]
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {"_hidden", "$x^$\\x1b[1m"}
    assert not set(texts(figure)) & {"\x1b", "\x07"} and png(figure)
