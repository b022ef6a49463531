"""Tables of records: scores, tests, marks, published numbers, and what must not be mixed or has to be said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from camex_ft.results.entries import Entry, Result
from camex_ft.results.record import Record, load_record, pack
from camex_ft.results.statistics import holm
from camex_ft.results.tables import Panel, Table, make_table
from camex_ft.utils.errors import UserError
from scripts.docs import error_rates

ROOT = Path(__file__).resolve().parents[2]


@lru_cache
def committed() -> Record:
    return load_record(ROOT / "results" / "records" / "minilm-sst2" / "dense-seed0.json")


def record(best: float | None = 0.8, *, seed: int = 0, **parts: dict[str, Any]) -> Record:
    """A record like the committed one, clean; `parts` are changes to its sections."""
    made = committed()
    sections = {"metrics": {"best": best, "last": best}, "environment": {"dirty": False}}
    for name, changes in parts.items():
        sections[name] = {**sections.get(name, {}), **changes}
    changed = {name: getattr(made, name).model_copy(update=values) for name, values in sections.items()}
    return made.model_copy(update={"seed": seed, **changed})


def entry(row: str, seed: int, best: float | None = 0.8, *, task: str = "glue/sst2", **parts: Any) -> Entry:
    return Entry(task=task, row=row, seed=seed, result=Result(record=record(best, seed=seed, **parts)))


def entries(scores: dict[str, Sequence[float | None]], **options: Any) -> list[Entry]:
    """Row -> its score of the seeds 0, 1, ..."""
    return [entry(row, seed, best, **options) for row, of in scores.items() for seed, best in enumerate(of)]


def panel(table: Table) -> Panel:
    assert len(table.panels) == 1
    return table.panels[0]


# -- scores -----------------------------------------------------------------------------------------------------------


def test_mean_spread_and_order() -> None:
    made = panel(make_table(entries({"ties": (0.9, 0.7), "dense": (0.8, 0.8)})))
    assert [row.label for row in made.rows] == ["dense", "ties"]
    dense, ties = made.rows
    # sample standard deviation of 70 and 90: sqrt(200)
    assert (ties.best.mean, ties.best.sd) == pytest.approx((80.0, 200**0.5))
    assert (dense.last.mean, dense.last.sd) == pytest.approx((80.0, 0.0))
    assert (made.metric, made.scale, ties.seeds, ties.missing) == ("accuracy", 100, (0, 1), ())
    assert ties.parameters == committed().model.parameters


def test_a_perplexity_stands_as_it_is_and_less_of_it_is_best() -> None:
    less = {"primary": "perplexity", "greater_is_better": False}
    made = panel(make_table(entries({"dense": (20.5, 21.0), "ties": (18.25, 18.5)}, metrics=less)))
    assert made.rows[1].best.mean == pytest.approx(18.375)
    assert made.rows[1].mark == "best"
    against = made.rows[1].against
    assert against is not None and against.difference == pytest.approx(-2.375)


def test_best_and_last_epoch_are_two_numbers() -> None:
    made = panel(make_table([entry("dense", 0, 0.8, metrics={"best": 0.9})]))
    assert (made.rows[0].best.mean, made.rows[0].last.mean) == pytest.approx((90.0, 80.0))


@pytest.mark.parametrize(
    ("strategy", "moment"), [("epoch", "epoch"), ("steps", "evaluation"), ("no", "evaluation")]
)
def test_scores_are_of_what_the_configuration_evaluates_after(strategy: str, moment: str) -> None:
    by_epoch = entry("dense", 0)
    assert by_epoch.result is not None
    config = {"training": {"eval_strategy": strategy}}
    other = Result(record=by_epoch.result.record.model_copy(update={"config": config}))
    assert panel(make_table([replace(by_epoch, result=other)])).moment == moment


def test_missing_seeds_and_lame_scores_are_said() -> None:
    grid = [
        *entries({"dense": (0.8, 0.7, 0.75), "ties": (0.9, None)}),
        Entry(task="glue/sst2", row="ties", seed=2),
    ]
    made = panel(make_table(grid))
    ties = made.rows[1]
    assert (ties.seeds, ties.missing, ties.best.by_seed) == ((0, 1), (2,), {0: pytest.approx(90.0)})
    assert "missing seeds: `ties` 2" in made.notes
    assert "left out, as the score is not a number: `ties` 1" in made.notes
    assert ties.against is not None and ties.against.seeds == (0,) and ties.p_holm is None


def test_a_row_or_a_task_without_any_run_is_there() -> None:
    grid = [*entries({"dense": (0.8,)}), Entry(task="glue/sst2", row="ties", seed=0)]
    grid.append(Entry(task="glue/rte", row="dense", seed=0))
    first, second = make_table(grid).panels
    assert first.rows[1].best.mean is None and first.rows[1].against is not None
    assert (second.task, second.metric, second.rows[0].missing) == ("glue/rte", "", (0,))


def test_resumed_runs_are_not_in_the_time() -> None:
    grid = [
        entry("dense", 0, run={"seconds": 100.0}),
        entry("dense", 1, run={"seconds": 5.0, "resumed": 40}),
        entry("dense", 2, run={"seconds": 200.0}),
    ]
    made = panel(make_table(grid))
    assert (made.rows[0].seconds, made.rows[0].timed) == (150.0, 2)
    assert any("resumed" in note and "`dense` 1" in note for note in made.notes)


# -- tests and marks --------------------------------------------------------------------------------------------------


def test_p_values_are_scipys_corrected_over_all_tasks() -> None:
    generator = np.random.default_rng(0)
    scores = {row: 0.8 + 0.01 * generator.normal(size=5) for row in ("dense", "ties", "smear")}
    other = {row: 0.6 + 0.01 * generator.normal(size=5) for row in ("dense", "ties")}
    table = make_table([*entries(scores), *entries(other, task="glue/rte")])
    rows = [row for made in table.panels for row in made.rows if row.label != "dense"]
    expected = [
        stats.ttest_rel(of[row], of["dense"]).pvalue
        for of, row in ((scores, "ties"), (scores, "smear"), (other, "ties"))
    ]
    assert [row.against.p_t for row in rows if row.against] == pytest.approx(expected, rel=1e-6)
    assert [row.p_holm for row in rows] == pytest.approx(holm(expected), rel=1e-6)
    assert table.comparisons == 3


def test_a_row_that_always_differs_by_the_same_is_counted_but_not_tested() -> None:
    scores = {"dense": (0.8, 0.7, 0.75), "ties": (0.81, 0.71, 0.76), "smear": (0.85, 0.72, 0.79)}
    table = make_table(entries(scores))
    _, ties, smear = panel(table).rows
    assert table.comparisons == 2
    assert ties.p_holm is None and ties.against is not None
    assert ties.against.difference == pytest.approx(1.0)
    assert smear.against is not None and smear.against.p_t is not None
    assert smear.p_holm == pytest.approx(2 * smear.against.p_t)


def test_marks() -> None:
    scores = {
        "dense": (0.70, 0.71, 0.72, 0.70, 0.71),  # worse with every seed, by about as much
        "ties": (0.80, 0.82, 0.81, 0.79, 0.80),
        "smear": (0.80, 0.81, 0.82, 0.79, 0.795),
        "dare": (0.99,),  # the best mean, but of one seed
    }
    made = panel(make_table(entries(scores)))
    assert {row.label: row.mark for row in made.rows} == {
        "dense": "",
        "ties": "best",
        "smear": "level",
        "dare": "",
    }


def test_equal_means_are_both_best_and_a_row_alone_is_not() -> None:
    made = panel(make_table(entries({"dense": (0.8, 0.7), "ties": (0.7, 0.8)})))
    assert [row.mark for row in made.rows] == ["best", "best"]
    assert panel(make_table(entries({"dense": (0.8, 0.7)}))).rows[0].mark == ""


def test_answers_are_compared_seed_by_seed() -> None:
    right, wrong = pack([True] * 12), pack([True] * 2 + [False] * 10)
    grid = [
        *(entry("ties", seed, 0.9, metrics={"correct": right}) for seed in (0, 1)),
        *(entry("dense", seed, 0.8, metrics={"correct": wrong if seed else None}) for seed in (0, 1)),
    ]
    against = panel(make_table(grid)).rows[1].against
    assert against is not None and against.mcnemar is not None
    assert (against.mcnemar.seeds, against.mcnemar.gained, against.mcnemar.lost) == (1, 10, 0)
    assert against.mcnemar.p == pytest.approx(2 / 2**10)


def test_without_its_baseline_nothing_is_tested() -> None:
    table = make_table(entries({"dense": (0.8, 0.7), "ties": (0.9, 0.7)}), baseline="dens")
    assert table.comparisons == 0 and all(row.against is None for row in panel(table).rows)
    assert "no row `dens` to compare with. Did you mean 'dense'?" in panel(table).notes[0]


def test_decision_is_the_simulated_one() -> None:
    """What a table calls different is what tests/results/test_stats.py counts: 12 tables of 7 rows, 5 seeds."""
    for values in error_rates.differences(5, rows=7, trials=12, effect=1.5, seed=3):
        scores: dict[str, Sequence[float]] = {"dense": [0.5] * 5}
        scores |= {f"row {i}": list(0.5 + d / 100) for i, d in enumerate(values)}
        expected = [p is not None and p < 0.05 for p in holm(error_rates.t_test(values))]
        rows = panel(make_table(entries(scores))).rows[1:]
        assert [row.p_holm is not None and row.p_holm < 0.05 for row in rows] == expected


# -- what may stand in one table --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"sha256": "0" * 64}}, r"data \(sha256\).*000000000000 \(`ties` 0\)"),
        ({"run": {"profile": "paper"}}, "profile"),
        ({"metrics": {"primary": "f1"}}, "primary metric"),
    ],
)
def test_different_experiments_do_not_share_a_table(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_table([entry("dense", 0), entry("ties", 0, **changes)])


def test_rows_may_be_backbones_each_the_same_in_its_row() -> None:
    def of(row: str, seed: int, name: str, sha: str | None) -> Entry:
        made = entry(row, seed, model={"backbone_sha256": sha})
        result = Result(record=made.result.record.model_copy(update={"backbone": name}))
        return replace(made, keys={"backbone": name}, result=result)

    grid = [of("dense", 0, "x/hf", "a" * 64), of("dense", 1, "x/hf", None), of("ties", 0, "y/hf", "b" * 64)]
    assert panel(make_table(grid)).backbone == "x/hf, y/hf"
    with pytest.raises(UserError, match=r"differ in backbone \(sha256\).*aaaaaaaaaaaa.*cccccccccccc"):
        make_table([*grid, of("dense", 2, "x/hf", "c" * 64)])


def test_records_that_lack_the_content_of_their_backbone_stand_beside_those_that_have_it() -> None:
    known, other = {"backbone_sha256": "a" * 64}, {"backbone_sha256": "b" * 64}
    make_table([entry("dense", 0), entry("dense", 1, model=known), entry("ties", 0, model=known)])
    with pytest.raises(UserError, match=r"differ in backbone \(sha256\)"):
        make_table([entry("dense", 0, model=known), entry("ties", 0, model=other)])


def test_tasks_may_differ_in_data() -> None:
    other = entry("dense", 0, task="glue/rte", data={"sha256": "0" * 64})
    assert len(make_table([entry("dense", 0), other]).panels) == 2


def test_one_seed_twice_is_refused() -> None:
    with pytest.raises(UserError, match="row 'dense' has seed 0 2 times"):
        make_table([entry("dense", 0), entry("dense", 0, 0.9)])


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        (
            {"environment": {"commit": "f" * 40}},
            "different commit: ffffffff (`ties` 0), 0edecc52 (the other 2)",
        ),
        ({"environment": {"host": "cpu-64"}}, "different host: cpu-64 (`ties` 0), cpu-2 (the other 2)"),
        ({"cost": {"device": "NVIDIA H100"}}, "different device: NVIDIA H100 (`ties` 0), cpu (the other 2)"),
        (
            {"environment": {"dirty": True}},
            "run with uncommitted changes: `ties` 0",
        ),
    ],
)
def test_different_circumstances_are_said(changes: dict[str, Any], note: str) -> None:
    grid = [entry("dense", 0), entry("dense", 1), entry("ties", 0, **changes)]
    notes = panel(make_table(grid)).notes
    assert note in notes
    assert panel(make_table(entries({"dense": (0.8, 0.7)}))).notes == ()


def test_different_versions_are_said_of_the_packages_that_both_know() -> None:
    versions = {**committed().environment.versions, "torch": "2.6.0"}
    del versions["rich"]
    notes = panel(make_table([entry("dense", 0), entry("ties", 0, environment={"versions": versions})])).notes
    assert "different versions: torch 2.13.0+cpu (`dense` 0), torch 2.6.0 (`ties` 0)" in notes


def configured(row: str, seed: int, keys: tuple[str, ...] = (), **sections: dict[str, Any]) -> Entry:
    made = record(seed=seed)
    config = {
        name: {**made.config.get(name, {}), **sections.get(name, {})}
        for name in {*made.config, *sections}
        if isinstance(made.config.get(name, {}), dict)
    }
    result = Result(record=made.model_copy(update={"config": config}))
    return Entry(task="glue/sst2", row=row, seed=seed, keys=dict.fromkeys(keys), result=result)


def test_a_configuration_that_makes_no_row_is_said() -> None:
    training = {"learning_rate": 0.5, "seed": 7, "logging_steps": 1, "resume": "never"}
    notes = panel(make_table([configured("dense", 0), configured("ties", 0, training=training)])).notes
    assert notes == ("different training.learning_rate: 0.0001 (`dense` 0), 0.5 (`ties` 0)",)
    key = "training.learning_rate"
    made = [configured("dense", 0, (key,)), configured("ties", 0, (key,), training=training)]
    assert panel(make_table(made)).notes == ()


def test_rows_differ_in_merging_but_one_row_must_not() -> None:
    experts = {"experts": 8}
    assert panel(make_table([configured("dense", 0), configured("ties", 0, merging=experts)])).notes == ()
    notes = panel(make_table([configured("dense", 0), configured("dense", 1, merging=experts)])).notes
    assert notes == ("different merging.experts: 4 (`dense` 0), 8 (`dense` 1)",)


# -- published numbers ------------------------------------------------------------------------------------------------


def paper(row: str, best: float) -> Entry:
    found = entry(row, 0, best, run={"profile": "paper"})
    assert found.result is not None
    changed = found.result.record.model_copy(update={"backbone": "google-t5/t5-base"})
    return Entry(task=found.task, row=row, seed=0, result=Result(record=changed))


def test_published_numbers_stand_beside_ours() -> None:
    table = make_table([paper("dense", 0.93), paper("ties-ca", 0.95)], published="glue-t5-base")
    dense, ties = panel(table).rows
    assert dense.published == ()
    (number,) = ties.published
    assert (number.value, number.source) == (94.61, "camex")
    assert ties.gap(number) == pytest.approx(95 - 94.61)
    assert make_table([paper("ties-ca", 0.95)]).panels[0].rows[0].published == ()


def test_published_numbers_of_another_experiment_do_not() -> None:
    made = panel(make_table(entries({"ties-ca": (0.9,)}), baseline="ties-ca", published="glue-t5-base"))
    assert made.rows[0].published == ()
    assert made.notes == ("no published numbers: they are of profile paper, these runs of profile embedded",)
