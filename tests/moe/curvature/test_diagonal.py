"""Diagonal curvature by hand: what it multiplies with, how it starts, and what it can express."""

from __future__ import annotations

import torch

from camex_ft.moe.curvature.diagonal import DiagonalBiasFactors, DiagonalFactors

EXACT = 1e-12  # float64, a few products of numbers of about 1


@torch.no_grad()
def test_entries_are_multiplied_one_by_one() -> None:
    u = torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]])  # [2, 1, 2]
    v = torch.tensor([[[1.0, 1.0, 3.0]], [[5.0, 0.0, 1.0]]])  # [2, 1, 3]
    expected = torch.tensor([[[1.0, 1.0, 3.0], [7.0, 2.0, 7.0]]])
    assert torch.equal(
        DiagonalFactors(u, v).transform(torch.full((1, 2, 3), 3.0), torch.full((2, 3), 2.0)), expected
    )
    w = torch.tensor([[[2.0, -1.0]]])
    assert torch.equal(
        DiagonalBiasFactors(w).transform(torch.tensor([[3.0, 5.0]])), torch.tensor([[6.0, -5.0]])
    )


@torch.no_grad()
def test_enough_terms_make_any_diagonal_map() -> None:
    """Of rank R = min(out, in), from the singular values of the wanted map."""
    torch.manual_seed(0)
    wanted, tau = torch.randn(2, 4, 6).double(), torch.randn(2, 4, 6).double()
    left, values, right = torch.linalg.svd(wanted, full_matrices=False)
    factors = DiagonalFactors((left * values.unsqueeze(1)).permute(2, 0, 1), right.transpose(0, 1))
    assert factors.rank == 4
    torch.testing.assert_close(factors.transform(tau, None), wanted * tau, rtol=EXACT, atol=EXACT)


@torch.no_grad()
def test_terms_at_the_start() -> None:
    """The first is ones; of the others u is 0, and v is random of the size of ones, so that u can learn."""
    shapes = DiagonalFactors.shapes(out=5, width=7, experts=2, rank=3)
    assert shapes == {"u": (3, 2, 5), "v": (3, 2, 7)} and DiagonalBiasFactors.shapes(
        out=5, experts=2, rank=3
    ) == {"w": (1, 2, 5)}
    made = DiagonalFactors(*(torch.empty(shape) for shape in shapes.values()))
    made.reset()
    assert torch.equal(made.u[0], torch.ones(2, 5)) and torch.equal(made.v[0], torch.ones(2, 7))
    assert not made.u[1:].any()
    torch.testing.assert_close(made.v.square().mean(-1), torch.ones(3, 2))
    assert (made.v[1] - made.v[2]).abs().min(-1).values.gt(0).all()


def test_condition_number_by_hand() -> None:
    u, v = torch.tensor([[[1.0, -4.0]]]), torch.tensor([[[2.0, 3.0, -0.5]]])
    assert DiagonalFactors(u, v).condition().tolist() == [4 * 6]  # type: ignore[union-attr]
