"""Curvature: Kronecker products against `torch.kron`, the identity at the start, statistics against dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from camex_ft.moe.curvature import (
    Curvature,
    condition_number,
    distance_from_identity,
    make_curvature,
)
from camex_ft.moe.curvature.kronecker import KroneckerFactors, nearest_factors
from camex_ft.moe.merging.reference import curvature_reference
from tests.helpers.expert_layers import learn

EXPERTS = 3
# (out, in): factors of different size, a square, a prime
SHAPES = [(6, 8), (9, 4), (5, 12)]
RANKS = [1, 2, 3, 8]
EXACT = 1e-12  # float64, sums of about 100 products of numbers of about 1


def curvature(out: int, width: int, rank: int, *, shaken: float = 0.0) -> Curvature:
    torch.manual_seed(0)
    made = make_curvature(out_features=out, in_features=width, experts=EXPERTS, rank=rank, bias=True).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(shaken * torch.randn_like(parameter))
    return made


def matrix(factors: KroneckerFactors, expert: int) -> Tensor:
    """M_i as a matrix on vec(tau), rows first: sum_r A1 (x) A2 (x) C1 (x) C2."""
    total = torch.zeros(())
    for a1, a2, c1, c2 in zip(*(f[:, expert] for f in factors), strict=True):
        total = total + torch.kron(torch.kron(a1, a2), torch.kron(c1, c2))
    return total


@given(st.integers(1, 5000))
def test_nearest_factors_are_the_closest_pair(n: int) -> None:
    p, q = nearest_factors(n)
    assert p * q == n and p <= q
    assert not [d for d in range(p + 1, math.isqrt(n) + 1) if n % d == 0]


@pytest.mark.parametrize(("n", "pair"), [(768, (24, 32)), (3072, (48, 64)), (1, (1, 1)), (13, (1, 13))])
def test_nearest_factors_of_known_sizes(n: int, pair: tuple[int, int]) -> None:
    assert nearest_factors(n) == pair


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_every_rank_starts_as_the_identity(out: int, width: int, rank: int) -> None:
    made = curvature(out, width, rank)
    tau, bias = torch.randn(EXPERTS, out, width).double(), torch.randn(EXPERTS, out).double()
    assert torch.equal(curvature_reference(tau, made.factors), tau)  # further terms add exact zeros
    assert torch.equal(made.transform_bias(bias), bias)
    assert torch.equal(distance_from_identity(made.factors), torch.zeros(EXPERTS).double())


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_plain_curvature_is_the_kronecker_product(out: int, width: int, rank: int) -> None:
    factors = curvature(out, width, rank, shaken=0.5).factors
    tau = torch.randn(EXPERTS, out, width).double()
    curved = curvature_reference(tau, factors)
    for i in range(EXPERTS):
        expected = (matrix(factors, i) @ tau[i].flatten()).view(out, width)
        torch.testing.assert_close(curved[i], expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("rank", [1, 3])
def test_bias_is_curved_by_its_own_factors(rank: int) -> None:
    made = curvature(6, 8, rank, shaken=0.5)
    tau = torch.randn(EXPERTS, 6).double()
    curved = made.transform_bias(tau)
    for i in range(EXPERTS):
        total = sum(torch.kron(made.b1[r, i], made.b2[r, i]) for r in range(rank))
        torch.testing.assert_close(curved[i], total @ tau[i], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("rank", [2, 3])
def test_terms_come_to_differ(rank: int) -> None:
    """Terms that start equal stay equal: from the identity, a few steps must lead to a map of full rank R."""
    made = curvature(6, 8, rank)
    learn(made, lambda tau: curvature_reference(tau, made.factors))
    for i in range(EXPERTS):
        # the terms' A (x) C as vectors: linearly independent, none of them negligible
        terms = torch.stack(
            [
                matrix(KroneckerFactors(*(f[r : r + 1] for f in made.factors)), i).flatten()
                for r in range(rank)
            ]
        ).detach()
        singular = torch.linalg.svdvals(terms)
        assert singular[-1] > 1e-3 * singular[0]


@pytest.mark.parametrize("rank", [2, 3])
def test_terms_at_the_start(rank: int) -> None:
    """The first is the identity; of the others the leading factor is 0, so that they add nothing but can learn."""
    made = curvature(6, 8, rank)
    for factor in made.factors:
        assert torch.equal(factor[0], torch.eye(factor.shape[-1]).double().expand(EXPERTS, -1, -1))
    assert not made.a1[1:].any() and not made.b1[1:].any()
    for factor in (made.a2, made.c1, made.c2, made.b2):
        blocks = factor[1:].flatten(0, 1)
        eye = torch.eye(factor.shape[-1]).double().expand_as(blocks)
        # drawn in float32
        torch.testing.assert_close(blocks @ blocks.mT, eye, rtol=0, atol=1e-5)
    curvature_reference(torch.randn(EXPERTS, 6, 8).double(), made.factors).square().sum().backward()
    assert (made.a1.grad[1:].flatten(1).norm(dim=1) > 0).all()
    if rank > 2:
        assert not torch.equal(made.c1[1], made.c1[2])


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_distance_is_that_of_the_matrices(out: int, width: int, rank: int) -> None:
    factors = curvature(out, width, rank, shaken=0.3).factors
    eye = torch.eye(out * width).double()
    expected = torch.stack([(matrix(factors, i) - eye).norm() / eye.norm() for i in range(EXPERTS)])
    # a difference of traces of about out * in
    torch.testing.assert_close(distance_from_identity(factors), expected.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_condition_number_is_that_of_the_matrix(out: int, width: int) -> None:
    factors = curvature(out, width, 1, shaken=0.2).factors
    expected = torch.stack([torch.linalg.cond(matrix(factors, i)) for i in range(EXPERTS)])
    # a condition number of about 100 amplifies rounding by as much
    torch.testing.assert_close(condition_number(factors), expected.detach(), rtol=1e-8, atol=0)


def test_condition_number_of_a_sum_is_not_made_up() -> None:
    assert condition_number(curvature(6, 8, 2).factors) is None


def test_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rank is 0: expected at least 1"):
        curvature(6, 8, 0)
