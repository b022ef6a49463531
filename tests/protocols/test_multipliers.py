"""Each protocol's multiplier on numbers made by hand, and what protocols have in common with each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from camex_ft.protocols.dare import dare
from camex_ft.protocols.domain import domain
from camex_ft.protocols.smear import smear
from camex_ft.protocols.ties import ties
from camex_ft.utils.registry import PROTOCOLS
from tests.helpers.expert_layers import layer_of, merged_linear, multiplier_of, settings, tokens

TAU = torch.tensor(
    [[3.0, -1.0, 0.0, 2.0], [-1.0, -2.0, 5.0, -2.0], [1.0, 4.0, -1.0, 0.5]]
)  # sums: 3, 1, 4, 0.5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- domain, smear, dense, smoe: everything is taken as it is


@pytest.mark.parametrize("weigh", [domain, smear])
def test_taken_whole(weigh: object) -> None:
    assert weigh(TAU) is None  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "form", "base"),
    [
        ("dense", "dense", False),
        ("smoe", "outputs", False),
        ("smear", "weights", False),
        ("ties", "weights", True),
    ],
)
def test_forms(name: str, form: str, base: bool) -> None:
    found = PROTOCOLS.get(name)
    assert (found.form, found.base) == (form, base)
    if not base:
        assert multiplier_of(found, training=True, seed=0) is None


@pytest.mark.parametrize("shift", [0.0, 1.0, -3.0])
def test_smear_is_domain_at_alpha_one_whatever_the_base(shift: float) -> None:
    draw = generator()
    experts = torch.randn(3, 4, 5, generator=draw, dtype=torch.float64)
    base = experts.mean(0) + shift
    s = torch.randn(2, 3, generator=draw, dtype=torch.float64).softmax(-1)
    x = torch.randn(2, 6, 5, generator=draw, dtype=torch.float64)
    plain = merged_linear(x, s, experts, None)
    # float64: the base cancels up to rounding
    torch.testing.assert_close(merged_linear(x, s, experts, base), plain, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(merged_linear(x, s, experts, base, alpha=0.5), plain)


def test_smear_is_domain_in_a_whole_layer() -> None:
    domain_layer, smear_layer = layer_of(settings("domain")), layer_of(settings("smear", alpha=7.0))
    smear_layer.load_state_dict(domain_layer.state_dict(), strict=False)  # smear has no base and no alpha
    x = tokens(2, 4)
    torch.testing.assert_close(smear_layer(x), domain_layer(x), rtol=1e-12, atol=1e-12)


# -- ties


def test_ties_keeps_what_agrees_with_the_sum_and_zeros() -> None:
    expected = torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 1]])
    assert torch.equal(ties(TAU), expected)


def test_ties_without_a_majority_keeps_only_zeros() -> None:
    tau = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert torch.equal(ties(tau), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))


def test_ties_trims_by_magnitude_before_the_vote() -> None:
    # half of each expert's four entries: (3, 2), (5, and both 2s, which are equal), (4, and both 1s)
    expected = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0]])
    # votes after trimming: 3 + 0 + 1, -2 + 4, 5 - 1, 2 - 2 + 0 = 0
    assert torch.equal(ties(TAU, density=0.5), expected)


def test_a_trimmed_entry_has_no_vote() -> None:
    tau = torch.tensor([[-1.0, 9.0], [2.0, 1.0], [-2.0, 1.0], [-2.0, 1.0]])
    assert ties(tau)[:, 0].tolist() == [1, 0, 1, 1]
    tau = torch.tensor([[-3.0, 9.0], [2.0, 1.0]])
    assert ties(tau)[:, 0].tolist() == [1, 0]
    assert ties(tau, density=0.5)[:, 0].tolist() == [0, 1]  # the -3 is trimmed, so the 2 wins


VECTORS = arrays.arrays(
    np.float64,
    st.tuples(st.integers(2, 4), st.integers(1, 9)),
    elements=st.sampled_from([-2.0, -1, -0.5, 0, 1, 3]),
)


@given(VECTORS)
def test_ties_is_the_sign_election(tau: np.ndarray) -> None:
    expected = (np.sign(tau) == np.sign(tau.sum(0))) | (tau == 0)
    assert (ties(torch.from_numpy(tau)).numpy() == expected).all()


@given(VECTORS, st.floats(0.05, 0.99))
def test_density_keeps_that_many_of_the_largest(tau: np.ndarray, density: float) -> None:
    kept = ties(torch.from_numpy(tau), density=density).numpy()
    count = max(1, round(density * tau.shape[1]))
    for row, keep in zip(np.abs(tau), kept.astype(bool), strict=True):
        assert (row[keep] >= np.sort(row)[-count]).all()


@given(VECTORS)
def test_ties_depends_on_neither_scale_nor_sign(tau: np.ndarray) -> None:
    mask = ties(torch.from_numpy(tau))
    assert torch.equal(ties(torch.from_numpy(-tau)), mask)
    assert torch.equal(ties(torch.from_numpy(tau * 2)), mask)


def test_ties_works_on_biases_and_in_any_dtype() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert ties(TAU.to(dtype)).dtype == dtype
    assert torch.equal(ties(TAU.view(3, 2, 2)), ties(TAU).view(3, 2, 2))


# -- dare


def test_dare_keeps_and_rescales() -> None:
    ones = torch.ones(4, 50, 50)
    kept = dare(ones, training=True, generator=generator(), drop=0.2)
    values = kept.unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.8]))
    # 10,000 draws: the standard error of the share dropped is 0.004
    assert (kept == 0).double().mean().item() == pytest.approx(0.2, abs=0.02)


def test_dare_keeps_the_mean() -> None:
    draw = generator(1)
    total = sum(dare(TAU, training=True, generator=draw, drop=0.3) * TAU for _ in range(4000)) / 4000
    # standard error: |tau| sqrt(0.3 / 0.7 / 4000) = 0.0104 |tau|; five of them
    assert ((total - TAU).abs() <= 0.052 * TAU.abs()).all()


def test_dare_is_seeded() -> None:
    dropping = PROTOCOLS.get("dare").bind({"drop": 0.5})
    tau = torch.ones(3, 40)
    same = [multiplier_of(dropping, training=True, seed=3)(tau) for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], multiplier_of(dropping, training=True, seed=4)(tau))
    drawn = multiplier_of(dropping, training=True, seed=3)
    assert torch.equal(drawn(tau), drawn(tau))


def test_dare_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    multiplier_of(PROTOCOLS.get("dare"), training=True, seed=3)(TAU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("training", "drop"), [(False, 0.5), (True, 0.0)])
def test_dare_drops_nothing_in_evaluation_or_at_zero(training: bool, drop: float) -> None:
    assert dare(TAU, training=training, generator=generator(), drop=drop) is None


# -- with curvature


@pytest.mark.parametrize("name", ["ties", "dare", "domain"])
def test_the_multiplier_of_the_curved_twin_is_the_same(name: str) -> None:
    def multiplier(name: str) -> Tensor | None:
        keep = multiplier_of(PROTOCOLS.get(name), training=True, seed=5)
        return keep(TAU) if keep is not None else None

    plain, curved = multiplier(name), multiplier(f"{name}-ca")
    assert (plain is None) == (curved is None)
    if plain is not None and curved is not None:
        assert torch.equal(plain, curved)
