"""Paired tests: against SciPy, against enumeration by hand, at their edges, and by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from camex_ft.results.statistics import (
    DRAWS,
    Effect,
    compare,
    effect_size,
    holm,
    mcnemar,
    multisets,
    paired_bootstrap,
    paired_t,
)
from scripts.docs import error_rates

SCORES = st.lists(st.floats(0, 100), min_size=3, max_size=7)


def pair(n: int, seed: int = 0, gap: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    baseline = 80 + generator.normal(size=n)
    return baseline + gap + generator.normal(size=n), baseline


# -- paired t ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_t_is_that_of_one_sample_of_differences(n: int) -> None:
    ours, theirs = pair(n)
    p, low, high = paired_t(ours, theirs, level=0.1)
    d = ours - theirs
    half = scipy_stats.t.isf(0.05, n - 1) * d.std(ddof=1) / math.sqrt(n)
    assert p == pytest.approx(scipy_stats.ttest_1samp(d, 0).pvalue, rel=1e-9)
    assert (low, high) == pytest.approx((d.mean() - half, d.mean() + half), rel=1e-9)


def test_no_spread_no_test() -> None:
    """0.8 + 0.1 and so on: the same difference but for its rounding, which must not become p = 0."""
    baseline = np.array([0.8, 0.7, 0.6]) * 100
    assert paired_t(baseline + 10 * 0.1 * 3, baseline) == (None, None, None)
    assert paired_bootstrap(baseline + 10 * 0.1 * 3, baseline) is None
    assert effect_size(baseline + 3, baseline) == Effect()
    assert paired_t(baseline, baseline) == (1.0, None, None)
    assert paired_bootstrap(baseline, baseline) == 1.0


def test_one_pair_has_a_difference_and_no_test() -> None:
    found = compare({0: 81.0}, {0: 80.0})
    assert (found.seeds, found.difference) == ((0,), 1.0)
    assert (found.p_t, found.p_bootstrap, found.low, found.effect.value) == (None, None, None, None)


def test_two_pairs_have_no_effect_size() -> None:
    """Hedges' correction is 0 for one degree of freedom."""
    assert effect_size(np.array([1.0, 3.0]), np.zeros(2)) == Effect()


def test_pairs_are_by_seed_and_lame_scores_are_left_out() -> None:
    found = compare(
        {3: 1.0, 0: 5.0, 1: None, 2: float("nan"), 7: 9.0}, {0: 4.0, 1: 1.0, 2: 1.0, 3: 2.0, 8: 1.0}
    )
    assert found.seeds == (0, 3)
    assert found.difference == pytest.approx(0.0)
    assert compare({0: 1.0}, {1: 1.0}).seeds == ()


# -- bootstrap --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 4, 5])
def test_bootstrap_is_the_share_of_all_samples(n: int) -> None:
    ours, theirs = pair(n)
    d = ours - theirs
    t = abs(scipy_stats.ttest_1samp(d, 0).statistic)
    hits = 0
    for sample in itertools.product(d - d.mean(), repeat=n):
        values = np.array(sample)
        spread = values.std(ddof=1)
        hits += spread < 1e-12 or abs(values.mean()) / spread * math.sqrt(n) >= t * (1 - 1e-9)
    assert paired_bootstrap(ours, theirs) == pytest.approx(hits / n**n, rel=1e-9)


@pytest.mark.parametrize("n", range(2, 9))
def test_multisets_are_all_samples(n: int) -> None:
    counts, weights = multisets(n)
    assert counts.shape == (math.comb(2 * n - 1, n), n)
    assert (counts.sum(axis=1) == n).all()
    assert weights.sum() == pytest.approx(1, rel=1e-12)


def test_drawn_samples_agree_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(8, gap=0.7)
    exact = paired_bootstrap(ours, theirs)
    monkeypatch.setattr("camex_ft.results.statistics.EXACT", 0)
    drawn = paired_bootstrap(ours, theirs)
    assert exact is not None and drawn is not None and drawn != exact
    # four standard errors of 20,000 draws
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / DRAWS))


@given(SCORES, st.integers(0, 2**31))
def test_tests_do_not_know_order_unit_or_side(values: list[float], seed: int) -> None:
    """p stays under a permutation of the seeds, another unit, and when row and baseline change places."""
    ours = np.round(np.array(values), 2)
    theirs = np.round(50 + np.random.default_rng(seed).normal(size=len(ours)), 2)
    if np.ptp(ours - theirs) < 0.1:
        return
    order = np.random.default_rng(seed).permutation(len(ours))
    for test in (lambda a, b: paired_t(a, b)[0], paired_bootstrap):
        p = test(ours, theirs)
        assert p is not None and 0 <= p <= 1
        for other in (test(ours[order], theirs[order]), test(ours / 100, theirs / 100), test(theirs, ours)):
            assert other == pytest.approx(p, rel=1e-6)


# -- effect size, Holm, McNemar, power --------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "gap"), [(3, 1.0), (5, -2.0), (10, 0.0)])
def test_effect_and_its_interval(n: int, gap: float) -> None:
    ours, theirs = pair(n, gap=gap)
    d = ours - theirs
    found = effect_size(ours, theirs)
    f = n - 1
    correction = math.gamma(f / 2) / (math.sqrt(f / 2) * math.gamma((f - 1) / 2))
    assert found.value == pytest.approx(correction * d.mean() / d.std(ddof=1), rel=1e-9)
    assert found.low is not None and found.high is not None
    # at its ends the observed t leaves 2.5% on one side; to what SciPy's noncentral t is exact
    t = scipy_stats.ttest_1samp(d, 0).statistic
    assert scipy_stats.nct.sf(t, f, found.low * math.sqrt(n)) == pytest.approx(0.025, rel=1e-5)
    assert scipy_stats.nct.cdf(t, f, found.high * math.sqrt(n)) == pytest.approx(0.025, rel=1e-5)


def test_effect_turns_with_the_rows() -> None:
    one, other = effect_size(*pair(5)), effect_size(*pair(5)[::-1])
    assert one.value is not None and one.low is not None and one.high is not None
    assert (other.value, other.low, other.high) == pytest.approx((-one.value, -one.high, -one.low))


def test_interval_of_the_effect_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        found = effect_size(1.0 + generator.normal(size=5), np.zeros(5))
        assert found.low is not None and found.high is not None
        held += found.low <= 1.0 <= found.high
    # 380 expected, four standard errors
    assert abs(held - 380) <= 4 * math.sqrt(400 * 0.95 * 0.05)


def test_holm_by_hand() -> None:
    # 0.01 * 4; 0.02 * 3; 0.03 * 2 = 0.06 as well; 0.04 * 1 is less than what came before
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_was_not_tested_counts_as_a_comparison() -> None:
    assert holm([None, 0.02]) == [None, pytest.approx(0.04)]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_stepping_down_rejects(p: list[float]) -> None:
    corrected = holm(p)
    rejected = set()
    for k, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if p[i] * (len(p) - k) >= 0.05:
            break
        rejected.add(i)
    assert {i for i, value in enumerate(corrected) if value is not None and value < 0.05} == rejected


def test_mcnemar_of_one_seed_is_a_binomial_test() -> None:
    ours = np.array([1] * 9 + [0] * 2 + [1] * 20 + [0] * 4, dtype=bool)
    theirs = np.array([0] * 9 + [1] * 2 + [1] * 20 + [0] * 4, dtype=bool)
    found = mcnemar({5: ours}, {5: theirs}, (5,))
    assert found is not None and (found.seeds, found.gained, found.lost) == (1, 9, 2)
    # two tails of 11 tosses: (1 + 11 + 55) * 2 / 2048
    assert found.p == pytest.approx(134 / 2048)


def test_mcnemar_over_seeds_is_twice_the_median() -> None:
    rows = np.zeros(20, dtype=bool)

    def right(n: int) -> np.ndarray:
        return np.arange(20) < n

    ours = {0: right(5), 1: right(8), 2: right(1), 9: right(20)}
    found = mcnemar(ours, dict.fromkeys(ours, rows), (0, 1, 2))
    assert found is not None and (found.seeds, found.gained, found.lost) == (3, 14, 0)
    assert found.p == pytest.approx(2 * 2 / 2**5)
    same = mcnemar(ours, ours, (0, 1, 2))
    assert same is not None and same.p == 1.0
    assert mcnemar(ours, {}, (0,)) is None
    with pytest.raises(ValueError, match="seed 0"):
        mcnemar({0: rows}, {0: rows[1:]}, (0,))


def test_power_is_the_noncentral_t() -> None:
    critical = scipy_stats.t.isf(0.025, 4)
    shift = 2 * math.sqrt(5)
    both = scipy_stats.nct.sf(critical, 4, shift) + scipy_stats.nct.cdf(-critical, 4, shift)
    assert error_rates.power(2.0, 5) == pytest.approx(both, rel=1e-9)
    assert error_rates.power(0.0, 5) == pytest.approx(0.05, rel=1e-9)
    assert error_rates.power(3.0, 10) == pytest.approx(1.0, abs=1e-6)  # where SciPy's noncentral t gives up


# -- by simulation ----------------------------------------------------------------------------------------------------


def test_simulated_p_is_the_reported_one() -> None:
    values = error_rates.differences(5, rows=3, trials=4, effect=1.0)
    many = error_rates.t_test(values)
    boots = error_rates.bootstrap_test(values.reshape(-1, 5)).reshape(4, 3)
    for i, j in np.ndindex(4, 3):
        found = compare(dict(enumerate(80 + values[i, j])), dict.fromkeys(range(5), 80.0))
        assert found.p_t == pytest.approx(many[i, j], rel=1e-6)
        assert found.p_bootstrap == pytest.approx(boots[i, j], rel=1e-6)


def test_tables_without_a_difference_raise_no_more_than_5_percent_of_alarms() -> None:
    """1,000 tables of 7 rows and a baseline, 5 seeds; a table counts once, however many of its rows are called."""
    assert error_rates.false_alarms(5, trials=1000) <= 0.05
    # without correction it would be several times as many: the simulation can tell
    p = error_rates.t_test(error_rates.differences(5, rows=7, trials=1000))
    assert np.mean((p < 0.05).any(axis=1)) > 0.15


@pytest.mark.parametrize("n", [3, 5, 10])
def test_a_true_difference_of_two_deviations_is_found_as_often_as_theory_says(n: int) -> None:
    trials, expected = 4000, error_rates.power(2.0, n)
    found = error_rates.detected(n, effect=2.0, trials=trials)
    # four standard errors of a binomial proportion
    assert abs(found - expected) <= 4 * math.sqrt(expected * (1 - expected) / trials) + 1e-9


@pytest.mark.parametrize("noise", error_rates.NOISE)
@pytest.mark.parametrize("n", [3, 5, 7])
def test_bootstrap_keeps_its_level(n: int, noise: str) -> None:
    # 5% and two standard errors
    assert error_rates.bootstrap_alarms(n, trials=1000, noise=noise) <= 0.05 + 2 * math.sqrt(
        0.05 * 0.95 / 1000
    )


@pytest.mark.parametrize(("n", "at_least"), [(3, 0.25), (5, 0.12)])
def test_percentile_bootstrap_would_not(n: int, at_least: float) -> None:
    """Why the bootstrap is studentised: the plain one, of centred means, as docs/statistics.md says of it."""
    d = error_rates.differences(n, rows=1, trials=2000)[:, 0]
    counts, weights = multisets(n)
    mean = d.mean(axis=1, keepdims=True)
    p = (np.abs((d - mean) @ counts.T / n) >= np.abs(mean)) @ weights
    assert np.mean(p < 0.05) > at_least
