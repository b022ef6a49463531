"""Routing statistics against SciPy and against cases known by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from camex_ft.run.record_builder import entropy, layer_routing, load, nmi


def rows(seed: int, n: int = 50, experts: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(experts), size=n)


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 9))
def test_entropy_equals_scipys(seed, n, experts):
    s = rows(seed, n, experts)
    # rtol: both sum the same n * experts float64 terms, in different order
    np.testing.assert_allclose(entropy(s), scipy.stats.entropy(s, axis=1).mean(), rtol=1e-12, atol=1e-14)


def test_entropy_of_one_hot_is_zero_and_of_uniform_ln_n():
    assert entropy(np.eye(5)) == 0.0
    assert entropy(np.full((3, 8), 1 / 8)) == pytest.approx(np.log(8), rel=1e-14)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.99))
def test_entropy_of_rows_that_sum_to_less_is_that_of_the_rows_scaled_to_one(seed, share):
    s = rows(seed)
    assert entropy(share * s) == pytest.approx(entropy(s), rel=1e-12)
    assert entropy(np.zeros((2, 3))) == 0.0


def test_float32_weights_are_summed_in_float64():
    s = np.full((100_000, 4), 0.25, dtype=np.float32)
    assert entropy(s) == pytest.approx(np.log(4), rel=1e-14)


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 9))
def test_load_is_the_share_of_largest_weights(seed, n, experts):
    s = rows(seed, n, experts)
    share = load(s)
    assert share.shape == (experts,)
    assert share.sum() == pytest.approx(1.0, rel=1e-12)
    winners = [int(np.argmax(row)) for row in s]
    assert [round(x * n) for x in share] == [winners.count(i) for i in range(experts)]


def test_no_inputs():
    empty = np.zeros((0, 3))
    assert load(empty).tolist() == [0, 0, 0]
    assert layer_routing(empty).entropy is None


def test_nmi_of_relabelled_domains_is_one_and_of_a_constant_zero():
    domains = np.array([0, 1, 2] * 20)
    assert nmi(np.array([7, 3, 5])[domains], domains) == pytest.approx(1.0, rel=1e-12)
    assert nmi(np.zeros(60, int), domains) == 0.0


def test_nmi_by_hand():
    # Two equal domains, one of them split in two: I = ln 2, H(a) = 1.5 ln 2, H(d) = ln 2.
    assert nmi([0, 0, 1, 2], [0, 0, 1, 1]) == pytest.approx(1 / 1.25, rel=1e-12)


def test_layer_routing_scores_only_where_domains_are_known():
    s = np.eye(3)[[0, 0, 1, 2]]
    assert layer_routing(s).nmi is None
    assert layer_routing(s, {"label": ["no", "no", "no", "yes"]}).nmi is None
    scored = layer_routing(s, {"domain": [0, 0, 1, 1]})
    assert scored.nmi == pytest.approx(0.8, rel=1e-12)
    assert scored.by == {"domain": {"0": [1.0, 0.0, 0.0], "1": [0.0, 0.5, 0.5]}}
    assert scored.load == [0.5, 0.25, 0.25]
    assert scored.entropy == 0.0


def test_shape_is_checked():
    with pytest.raises(ValueError, match=r"\[inputs, experts\]"):
        load(np.ones(3))
