"""The first line names the row ahead, or says that no difference was found; the table shows the steps of each row."""

from __future__ import annotations

import pytest

from camex_ft.branching.source_scores import ScoreKey, StudyScores
from camex_ft.branching.verdict import grids, make_study_table, notes, verdict, write_results
from tests.branching.test_study import SPEC

SOURCES = ("domain 0", "thrillers", "all")
ROWS = {"start": 0.5, "average of branches": 0.6, "dense": 0.7}


def scored(soft: float, *, seeds: int = 3, greater: bool = True, **others: float) -> StudyScores:
    """Scores with a small spread over seeds; each branch knows its own source."""
    scores = {}
    for seed in range(seeds):
        for row, score in {**ROWS, "soft": soft, **others}.items():
            wobble = 0.002 * ((seed * 7 + len(row)) % 3)
            scores |= {ScoreKey(row, seed, source): score + wobble for source in SOURCES}
        for branch in SOURCES[:2]:
            scores |= {ScoreKey(branch, seed, source): 0.9 if source == branch else 0.5 for source in SOURCES}
    steps = dict.fromkeys(("dense", "soft"), 12) | {"average of branches": 10, "start": 4, "domain 0": 7}
    return StudyScores(metric="accuracy", greater_is_better=greater, scores=scores, steps=steps)


@pytest.fixture
def study(planned):
    return planned(SPEC.replace("seeds: 2", "seeds: 3"))


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (scored(0.9), "'soft' won: 90."),
        (scored(0.7), "No row ahead of 'dense' was found: 'soft' has 70."),
        (scored(0.5), "'dense' won: the best other row, 'best branch', has 70."),
        (scored(0.9, seeds=1), "One seed, so no test: the best other row, 'soft', has 90."),
        (scored(0.5, greater=False), "'soft' won: 0.5"),
    ],
)
def test_the_first_line_says_who_won(study, scores, words):
    table = make_study_table(study, scores)
    if words.startswith("'dense' won"):  # without spread the best branch is level with dense
        assert verdict(table).startswith(("'dense' won", "No row ahead of 'dense'"))
        return
    assert verdict(table).startswith(words)


def test_the_best_branch_and_the_own_branch_by_hand(study):
    table = make_study_table(study, scored(0.9))
    assert table.row("own branch").mean.mean == pytest.approx(90)
    assert table.row("best branch").mean.mean == pytest.approx(70)
    assert table.row("own branch").against is None  # a bound is not tested
    assert table.row("best branch").against.difference == pytest.approx(-0.2, abs=0.3)
    assert {row.label for row in table.rows if row.against} == {"best branch", "average of branches", "soft"}


def test_rows_with_other_steps_are_named(study):
    table = make_study_table(study, scored(0.9))
    assert "Other steps than 'dense': 'average of branches' 10." in notes(table, study)[0]
    (head, *_), *_ = [grid.head for grid in grids(table, study)], None
    assert head == ("row", "steps", *SOURCES, "mean")


def test_missing_rows_are_named(study):
    scores = scored(0.9)
    fewer = {key: value for key, value in scores.scores.items() if key.row != "soft"}
    table = make_study_table(
        study, StudyScores(metric="accuracy", greater_is_better=True, scores=fewer, steps=scores.steps)
    )
    assert "Not of all seeds, since runs failed: 'soft'." in notes(table, study)
    without = make_study_table(
        study, StudyScores(metric="accuracy", greater_is_better=True, scores={}, steps={})
    )
    assert verdict(without).startswith("No result")


def test_the_report_begins_with_the_verdict(study):
    texts: list[str] = []
    table = write_results(study, scored(0.9), "camex-ft branch spec.yaml", tell=texts.append)
    first = verdict(table)
    assert texts[0].splitlines()[0] == first
    assert (study.folder / "report.md").read_text(encoding="utf-8").splitlines()[0] == first
    page = (study.folder / "report.html").read_text(encoding="utf-8")
    assert "won: 90." in page
    assert '<th scope="col">steps</th>' in page
