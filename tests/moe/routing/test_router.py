"""Routing weights: softmax over the k largest, means that skip padding, noise in training alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from camex_ft.moe.routing.router import NOISE_FLOOR, Router, masked_mean, topk_softmax

EXACT = 1e-12  # float64, sums of at most a dozen terms
LOGITS = arrays.arrays(
    np.float64, st.tuples(st.integers(1, 4), st.integers(2, 6)), elements=st.floats(-50, 50)
)


def router(*, top_k: int = 4, noise: bool = True, prior: bool = False) -> Router:
    torch.manual_seed(0)
    made = Router(in_features=6, experts=4, top_k=top_k, noise=noise, prior=prior)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


@given(LOGITS, st.data())
def test_topk_softmax_is_the_softmax_of_the_k_largest(logits: np.ndarray, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, logits.shape[1]))
    s = topk_softmax(torch.from_numpy(logits), top_k=k).numpy()
    for row, weights in zip(logits, s, strict=True):
        chosen = np.flatnonzero(weights)
        rest = np.setdiff1d(np.arange(len(row)), chosen)
        assert len(chosen) <= k  # fewer only where a weight underflows
        assert row[chosen].min() >= np.sort(row)[-k]
        assert (weights[rest] == 0).all()
        largest = np.exp(np.sort(row)[-k:] - row.max())
        np.testing.assert_allclose(np.sort(weights)[-k:], largest / largest.sum(), rtol=EXACT, atol=EXACT)


def test_topk_above_the_number_of_experts_takes_all() -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(topk_softmax(logits, top_k=9), logits.softmax(-1))


@given(st.lists(st.lists(st.integers(0, 1), min_size=5, max_size=5), min_size=1, max_size=4))
def test_masked_mean_is_the_mean_of_the_tokens_that_count(mask: list[list[int]]) -> None:
    x = torch.randn(len(mask), 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = masked_mean(x, torch.tensor(mask))
    for row, keep, mean in zip(x, mask, found, strict=True):
        tokens = [t for t, k in zip(row, keep, strict=True) if k]
        expected = sum(tokens) / len(tokens) if tokens else torch.zeros(3)
        torch.testing.assert_close(
            mean, torch.as_tensor(expected, dtype=torch.float64), rtol=EXACT, atol=EXACT
        )
    assert torch.equal(masked_mean(x, None), x.mean(1))


@pytest.mark.parametrize("rubbish", [math.nan, math.inf])
def test_what_padding_holds_reaches_neither_mean_nor_gradient(rubbish: float) -> None:
    x = torch.ones(1, 3, 2)
    x[0, 2] = rubbish
    x.requires_grad_()
    mean = masked_mean(x, torch.tensor([[1, 1, 0]]))
    mean.sum().backward()
    assert torch.equal(mean, torch.ones(1, 2))
    assert torch.equal(x.grad, torch.tensor([[[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]]]))


def test_noise_is_drawn_in_training_alone() -> None:
    layer, x = router(top_k=2), torch.randn(5, 6)
    quiet = layer.eval()(x)
    assert quiet.noisy is None and quiet.scale is None
    assert torch.equal(quiet.weights, topk_softmax(x @ layer.gate, top_k=2))

    layer.train()
    torch.manual_seed(3)
    noisy = layer(x)
    torch.manual_seed(3)
    scale = torch.nn.functional.softplus(x @ layer.noise) + NOISE_FLOOR
    expected = x @ layer.gate + torch.randn(5, 4) * scale
    assert torch.equal(noisy.logits, quiet.logits)
    assert torch.equal(noisy.scale, scale)
    assert torch.equal(noisy.noisy, expected)
    assert torch.equal(noisy.weights, topk_softmax(expected, top_k=2))


def test_without_noise_training_routes_as_evaluation() -> None:
    layer, x = router(noise=False), torch.randn(5, 6)
    assert layer.noise is None
    assert torch.equal(layer.train()(x).weights, layer.eval()(x).weights)


def test_noise_scale_starts_at_softplus_of_zero() -> None:
    layer = Router(in_features=6, experts=4, top_k=4, noise=True, prior=True)
    scale = layer(torch.randn(2, 6)).scale
    torch.testing.assert_close(scale, torch.full((2, 4), math.log(2) + 1e-2))
    assert torch.equal(layer.route_prior(2).weights, torch.full((2, 4), 0.25))
    assert layer.gate.std() > 0  # inputs are told apart from the first step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_routed_in_float32(dtype: torch.dtype) -> None:
    layer, x = router().eval(), torch.randn(5, 6).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.weights.dtype == torch.float32
    assert torch.equal(found.weights, layer(x.float()).weights)


def test_prior_is_the_same_for_every_row_and_without_noise() -> None:
    layer = router(prior=True, top_k=2).train()
    found = layer.route_prior(3)
    assert torch.equal(found.weights, topk_softmax(layer.prior, top_k=2).expand(3, -1))
    assert found.noisy is None


def test_double_parameters_route_in_double() -> None:
    layer = router(prior=True).double().eval()
    assert layer(torch.randn(2, 6, dtype=torch.float64)).weights.dtype == torch.float64
    assert torch.equal(layer.route_prior(1).weights[0], layer.prior.softmax(0))


def test_a_router_without_prior_says_so() -> None:
    with pytest.raises(ValueError, match="without a prior"):
        router().route_prior(2)


@pytest.mark.parametrize("top_k", [0, 5])
def test_impossible_top_k_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k}: expected 1 to 4"):
        router(top_k=top_k)
