"""Low-rank curvature by hand: its two matrices, and how it starts."""

from __future__ import annotations

import pytest
import torch

from camex_ft.moe.curvature.low_rank import LowRankBiasFactors, LowRankFactors

EXACT = 1e-12  # float64, a few products of numbers of about 1
N, OUT, IN, RANK = 3, 12, 10, 2


def made(rank: int = RANK, *, shaken: float = 0.5) -> LowRankFactors:
    torch.manual_seed(0)
    shapes = LowRankFactors.shapes(out=OUT, width=IN, experts=N, rank=rank)
    factors = LowRankFactors(*(torch.empty(shape, dtype=torch.float64) for shape in shapes.values()))
    factors.reset()
    return LowRankFactors(*(f + shaken * torch.randn_like(f) for f in factors))


@torch.no_grad()
def test_a_matrix_on_either_side() -> None:
    factors = made()
    experts, base = torch.randn(N, OUT, IN).double(), torch.randn(OUT, IN).double()
    for i in range(N):
        left = torch.eye(OUT) + factors.u[:, i].T @ factors.v[:, i]
        right = torch.eye(IN) + factors.p[:, i].T @ factors.q[:, i]
        expected = left @ (experts[i] - base) @ right.T
        torch.testing.assert_close(factors.transform(experts, base)[i], expected, rtol=EXACT, atol=EXACT)
        own = LowRankBiasFactors(factors.u, factors.v).transform(experts[:, :, 0])
        torch.testing.assert_close(own[i], left @ experts[i, :, 0], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("rank", [1, 4, 30])
def test_columns_at_the_start(rank: int) -> None:
    """U and P are 0, V and Q have orthonormal columns, or rows where the rank is above the size."""
    factors = made(rank, shaken=0)
    assert not factors.u.any() and not factors.p.any()
    for factor, size in ((factors.v, OUT), (factors.q, IN)):
        for i in range(N):
            columns = factor[:, i]  # [R, k]
            gram = columns @ columns.T if rank <= size else columns.T @ columns
            torch.testing.assert_close(gram, torch.eye(len(gram)).double(), rtol=0, atol=EXACT)
        assert not torch.equal(factor[:, 0], factor[:, 1])
