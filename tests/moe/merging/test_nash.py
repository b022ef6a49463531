"""Nash bargaining: the weights solve G^T G a = 1 / a, from the Gram matrix alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from torch import Tensor

from camex_ft.moe.merging.nash import nash_weights

PROBLEMS = 200


def vectors(count: int, condition: float, seed: int) -> Tensor:
    """Return G [3 N, N], float64, whose Gram matrix has this condition number, in lengths from 1e-3 to 1e3."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(3 * count, count, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=torch.float64))
    singular = torch.logspace(0, -0.5 * float(np.log10(condition)), count, dtype=torch.float64)
    return left * singular @ right.T * 10 ** (seed % 7 - 3)


def residual(gram: Tensor, a: Tensor) -> float:
    """Return |G^T G a - 1 / a| / |1 / a|."""
    return float((gram @ a - 1 / a).norm() / (1 / a).norm())


def test_residual_in_the_default_budget() -> None:
    worst = 0.0
    for seed in range(PROBLEMS):
        g = vectors(2 + seed % 15, 10 ** (6 * seed / (PROBLEMS - 1)), seed)
        gram = g.T @ g
        a = nash_weights(gram)
        assert bool((a > 0).all())
        worst = max(worst, residual(gram, a))
    assert worst <= 1e-6


@pytest.mark.parametrize("seed", range(50))
def test_agrees_with_scipy(seed: int) -> None:
    """SciPy's minimiser of the same convex function, started at 1; condition numbers up to 1e3, where it converges."""
    g = vectors(2 + seed % 15, 10 ** (3 * seed / 49), 7 * seed)  # lengths of about 1e-3
    gram = (g.T @ g).numpy()
    scale = np.sqrt(np.diag(gram))
    k = gram / np.outer(scale, scale)
    found = optimize.minimize(
        lambda t: 0.5 * np.exp(t) @ k @ np.exp(t) - t.sum(),  # b = exp(t) > 0
        np.zeros(len(k)),
        jac=lambda t: np.exp(t) * (k @ np.exp(t)) - 1,
        method="BFGS",
        options={"gtol": 1e-10, "maxiter": 5000},
    )
    # BFGS stops at a gradient of about 1e-8 where rounding ends its line search
    np.testing.assert_allclose(
        nash_weights(torch.from_numpy(gram)).numpy(), np.exp(found.x) / scale, rtol=1e-5
    )


@given(lengths=st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=16))
@settings(max_examples=50, deadline=None)
def test_orthogonal_vectors_weigh_one_over_their_length(lengths: list[float]) -> None:
    given_lengths = torch.tensor(lengths, dtype=torch.float64)
    torch.testing.assert_close(
        nash_weights(torch.diag(given_lengths**2)), 1 / given_lengths, rtol=1e-12, atol=0
    )


@given(
    gram=st.integers(1, 6).flatmap(
        lambda n: st.lists(
            st.lists(st.floats(-3, 3) | st.just(0.0) | st.just(1e-30), min_size=5, max_size=5),
            min_size=n,
            max_size=n,
        )
    ),
    scale=st.sampled_from([1e-20, 1.0, 1e15]),
)
@settings(max_examples=100, deadline=None)
def test_never_a_nan_and_a_step_of_at_most_sqrt_n(gram: list[list[float]], scale: float) -> None:
    """Zero, parallel, opposite and dependent vectors among them: as many as 6 of 5 dimensions."""
    g = torch.tensor(gram, dtype=torch.float64).T * scale
    a = nash_weights(g.T @ g)
    assert bool(a.isfinite().all()) and bool((a >= 0).all())
    assert bool((a[g.norm(dim=0) == 0] == 0).all())
    # |G a|^2 = N at the solution; less where no solution is. Rounding of cancelling vectors is multiplied by up to 1e5
    assert float((g @ a).norm()) <= len(a) ** 0.5 * (1 + 1e-3)


def test_how_training_starts() -> None:
    """All domain vectors zero, then all the same, or nearly: the weights are equal and the step has length sqrt(N)."""
    assert torch.equal(nash_weights(torch.zeros(4, 4)), torch.zeros(4, dtype=torch.float64))
    tau = torch.ones(4, 100) + 1e-5 * torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    for vectors_ in (torch.ones(4, 100), tau):
        a = nash_weights(vectors_ @ vectors_.T)  # float32, whose rounding is larger than their differences
        torch.testing.assert_close(a, torch.full((4,), 0.05, dtype=torch.float64), rtol=1e-2, atol=0)
        assert abs(float((a.float() @ vectors_).norm()) - 2) < 1e-3


def test_vectors_that_are_not_finite_are_left_out() -> None:
    gram = torch.tensor([[float("nan"), 1.0], [1.0, 4.0]])
    a = nash_weights(torch.block_diag(torch.tensor([[float("inf")]]), torch.tensor([[4.0]])))
    assert a.tolist() == pytest.approx([0.0, 0.5])
    assert bool(nash_weights(gram).isfinite().all())


def test_a_batch_is_its_problems() -> None:
    grams = torch.stack([g.T @ g for g in (vectors(5, 100, seed) for seed in range(6))]).view(2, 3, 5, 5)
    together = nash_weights(grams)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(together[i, j], nash_weights(grams[i, j]), rtol=1e-12, atol=0)


def test_a_start_saves_iterations_and_cannot_harm() -> None:
    g = vectors(8, 1e6, 3)
    moved = g + 1e-3 * g.norm() * torch.randn(
        g.shape, generator=torch.Generator().manual_seed(1), dtype=g.dtype
    )
    gram, last = moved.T @ moved, nash_weights(g.T @ g)
    assert residual(gram, nash_weights(gram, start=last, iterations=8)) < 1e-6
    assert residual(gram, nash_weights(gram, iterations=8)) > 1e-3
    for bad in (
        torch.zeros(8),
        torch.full((8,), float("nan")),
        -last,
        torch.full((8,), 1e200, dtype=torch.float64),
    ):
        assert residual(gram, nash_weights(gram, start=bad)) < 1e-6


def test_there_is_no_gradient() -> None:
    tau = torch.randn(3, 10, requires_grad=True)
    assert not nash_weights(tau @ tau.T).requires_grad
