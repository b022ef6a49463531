"""The balance loss: squared coefficients of variation of importance and load, and Shazeer's smooth load."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from camex_ft.moe.routing.losses import cv_squared, load, smooth_load, sum_losses
from camex_ft.moe.routing.router import Routing, topk_softmax

GROUPS, EXPERTS = 4, 5


def noisy_routing(top_k: int, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(GROUPS, EXPERTS, generator=generator, dtype=torch.float64)
    scale = torch.rand(GROUPS, EXPERTS, generator=generator, dtype=torch.float64) + 0.3
    noisy = logits + scale * torch.randn(GROUPS, EXPERTS, generator=generator, dtype=torch.float64)
    return Routing(topk_softmax(noisy, top_k=top_k), logits, noisy, scale)


def cv2(v: np.ndarray) -> float:
    return float(v.var(ddof=1) / (v.mean() ** 2 + 1e-10))


@given(arrays.arrays(np.float64, st.integers(2, 9), elements=st.floats(0, 100)))
def test_cv_squared_is_that_of_numpy(v: np.ndarray) -> None:
    assert float(cv_squared(torch.from_numpy(v))) == pytest.approx(cv2(v), rel=1e-10, abs=1e-10)


def test_cv_squared_of_one_entry_is_zero() -> None:
    assert cv_squared(torch.tensor([3.0])) == 0


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_smooth_load_is_the_chance_to_stay_among_the_k_largest(top_k: int) -> None:
    routing = noisy_routing(top_k)
    draws = 40_000
    generator = np.random.default_rng(1)
    logits, noisy, scale = (t.numpy() for t in (routing.logits, routing.noisy, routing.scale))
    expected = np.empty((GROUPS, EXPERTS))
    for g in range(GROUPS):
        for i in range(EXPERTS):  # the others keep the noise they drew, expert i draws again
            own = logits[g, i] + scale[g, i] * generator.standard_normal(draws)
            others = np.sort(np.delete(noisy[g], i))
            expected[g, i] = (own > others[-top_k]).mean()
    # the standard error of a frequency is at most 0.5 / sqrt(draws) = 0.0025: five of them
    np.testing.assert_allclose(smooth_load(routing, top_k=top_k).numpy(), expected, atol=0.0125, rtol=0)


def test_smooth_load_has_gradients_of_logits_and_scale() -> None:
    start = noisy_routing(2)
    logits, scale = start.logits.clone().requires_grad_(), start.scale.clone().requires_grad_()
    noise = (start.noisy - start.logits) / start.scale

    def total(logits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        noisy = logits + scale * noise
        return smooth_load(Routing(start.weights, logits, noisy, scale), top_k=2)

    assert torch.autograd.gradcheck(total, (logits, scale))
    total(logits, scale)[:, 0].sum().backward()
    assert logits.grad.abs().sum() > 0 and scale.grad.abs().sum() > 0


def test_load_is_a_count_where_nothing_is_left_out_or_no_noise_is_drawn() -> None:
    routing = noisy_routing(2)
    quiet = Routing(routing.weights, routing.logits)
    assert torch.equal(load(quiet, top_k=2), (routing.weights > 0).double())
    assert torch.equal(load(noisy_routing(EXPERTS), top_k=EXPERTS), torch.ones(GROUPS, EXPERTS).double())
    assert torch.equal(load(routing, top_k=2), smooth_load(routing, top_k=2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [2, EXPERTS])
def test_balance_loss_is_the_formula(top_k: int, masked: bool) -> None:
    routing = noisy_routing(top_k)
    mask = torch.tensor([1, 0, 1, 1]) if masked else None
    keep = slice(None) if mask is None else mask.bool().numpy()
    importance = routing.weights.numpy()[keep].sum(0)
    loads = load(routing, top_k=top_k).numpy()[keep].sum(0)
    found = sum_losses(routing, top_k=top_k, coef=0.3, mask=mask).loss()
    assert float(found) == pytest.approx(0.3 * (cv2(importance) + cv2(loads)), rel=1e-12)


def test_groups_in_two_axes_count_as_one_list() -> None:
    routing = noisy_routing(2)
    folded = Routing(*(t.view(2, 2, EXPERTS) for t in routing))
    mask = torch.tensor([1, 0, 1, 1])
    one = sum_losses(routing, top_k=2, coef=1.0, mask=mask).loss()
    two = sum_losses(folded, top_k=2, coef=1.0, mask=mask.view(2, 2)).loss()
    assert torch.equal(one, two)


def test_equal_use_costs_nothing_and_one_expert_costs_most() -> None:
    even = Routing(torch.full((6, 4), 0.25), torch.zeros(6, 4))
    assert sum_losses(even, top_k=4, coef=1.0).loss() == 0
    one = torch.zeros(6, 4)
    one[:, 2] = 1
    # cv^2 of (0, 0, 6, 0) is 9 / 2.25 = 4, for importance and for load
    assert float(sum_losses(Routing(one, one), top_k=1, coef=1.0).loss()) == pytest.approx(8, rel=1e-6)


def test_sums_of_two_halves_make_the_losses_of_the_whole() -> None:
    routing, mask = noisy_routing(2), torch.tensor([1, 0, 1, 1])
    given = {"top_k": 2, "coef": 0.3, "z_coef": 0.2}
    whole = sum_losses(routing, mask=mask, **given)
    halves = [
        sum_losses(Routing(*(t[part] for t in routing)), mask=mask[part], **given)
        for part in (slice(0, 1), slice(1, None))
    ]
    together = halves[0].of(halves[0].flat() + halves[1].flat())
    torch.testing.assert_close(
        together.loss(), whole.loss(), rtol=1e-14, atol=0
    )  # float64, another order of sums
    assert not torch.isclose(halves[0].loss() + halves[1].loss(), whole.loss(), rtol=1e-3)
