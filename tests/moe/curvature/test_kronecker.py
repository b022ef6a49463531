"""Products with Kronecker-factored maps: values and gradients against the plain formula under autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from camex_ft.moe.curvature import kronecker as blocks
from camex_ft.moe.curvature.kronecker import KroneckerFactors, chunks
from camex_ft.moe.merging.reference import curvature_reference

EXACT = 1e-12  # float64, sums of about 100 products of numbers of about 1
SIZES = st.integers(1, 4)


class Case:
    """Experts, base and factors of one map, and what the plain formula gives for them."""

    def __init__(self, sizes: tuple[int, int, int, int], *, experts: int, rank: int, base: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        out, width = sizes[0] * sizes[1], sizes[2] * sizes[3]
        self.experts = draw(experts, out, width).requires_grad_()
        self.base = draw(out, width) if base else None
        self.factors = KroneckerFactors(*(draw(rank, experts, k, k).requires_grad_() for k in sizes))
        self.grad = draw(experts, out, width)
        with torch.enable_grad():
            tau = self.experts if self.base is None else self.experts - self.base
            self.expected = curvature_reference(tau, self.factors)
        leaves = [self.experts, *self.factors]
        self.dtau, *self.dfactors = torch.autograd.grad(self.expected, leaves, self.grad)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.detach(), rtol=EXACT, atol=EXACT)


@given(
    sizes=st.tuples(SIZES, SIZES, SIZES, SIZES),
    experts=st.integers(1, 4),
    rank=st.integers(1, 3),
    base=st.booleans(),
    chunk=st.sampled_from([1, 40, 1 << 18]),  # one expert at a time, some, all
)
def test_agrees_with_the_plain_formula(
    sizes: tuple[int, int, int, int], experts: int, rank: int, base: bool, chunk: int
) -> None:
    case = Case(sizes, experts=experts, rank=rank, base=base)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(blocks.BLOCK_ELEMENTS, "cpu", chunk)
        close(case.factors.transform(case.experts, case.base), case.expected)
        grad = case.grad.clone()
        dfactors = case.factors.transform_backward(grad, case.experts, case.base, learn=True)
    close(grad, case.dtau)
    assert dfactors is not None
    for found, expected in zip(dfactors, case.dfactors, strict=True):
        close(found, expected)


@torch.no_grad()
def test_only_what_is_wanted_is_made() -> None:
    case = Case((2, 3, 2, 2), experts=3, rank=2, base=True)
    grad = case.grad.clone()
    assert case.factors.transform_backward(grad, case.experts, case.base, learn=False) is None
    close(grad, case.dtau)
    grad = case.grad.clone()
    dfactors = case.factors.transform_backward(grad, case.experts, case.base, learn=True, domain=False)
    assert torch.equal(grad, case.grad) and dfactors is not None
    close(dfactors.c2, case.dfactors[3])


@torch.no_grad()
def test_experts_that_are_not_active_are_left_alone() -> None:
    case = Case((2, 3, 2, 2), experts=3, rank=2, base=True)
    found = case.factors.transform(case.experts, case.base, active=[0, 2])
    close(found[[0, 2]], case.expected[[0, 2]])
    grad = case.grad.clone()
    dfactors = case.factors.transform_backward(grad, case.experts, case.base, active=[0, 2], learn=True)
    close(grad[[0, 2]], case.dtau[[0, 2]])
    assert torch.equal(grad[1], case.grad[1]) and dfactors is not None
    assert not dfactors.a1[:, 1].any()
    close(dfactors.a1[:, [0, 2]], case.dfactors[0][:, [0, 2]])


@given(count=st.integers(1, 9), budget=st.integers(1, 50))
def test_chunks_cover_every_expert_once(count: int, budget: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(blocks.BLOCK_ELEMENTS, "cpu", budget)
        found = list(chunks(torch.empty(count, 2, 3), None))
    assert [i for chunk in found for i in range(chunk.start, chunk.stop)] == list(range(count))
    assert len({chunk.stop - chunk.start for chunk in found[:-1]}) <= 1
