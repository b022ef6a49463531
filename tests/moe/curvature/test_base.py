"""Every kind of curvature: against the plain formula under autograd, the identity at the start, against its matrix."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from camex_ft.config.schema import CurvatureConfig
from camex_ft.moe import workspace as scratches
from camex_ft.moe.curvature import KINDS, Curvature, condition_number, distance_from_identity, make_curvature
from camex_ft.moe.curvature import kronecker as blocks
from camex_ft.moe.curvature.base import Factors
from camex_ft.moe.merging.reference import curvature_reference
from tests.helpers.expert_layers import learn, merged_linear, merged_linear_reference

EXACT = 1e-11  # float64, sums of about 100 products of numbers of about 1, up to four in a row
EXPERTS = 3
KIND = st.sampled_from(sorted(KINDS))
SIZE = st.integers(1, 7)
unhurried = settings(deadline=None, max_examples=60)  # the first call starts threads and libraries
every_kind = pytest.mark.parametrize("kind", KINDS)


def curvature(
    kind: str, out: int, width: int, rank: int, *, shaken: float = 0.0, bias: bool = True
) -> Curvature:
    torch.manual_seed(0)
    made = make_curvature(
        out_features=out, in_features=width, experts=EXPERTS, rank=rank, bias=bias, kind=kind
    ).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(shaken * torch.randn_like(parameter))
    return made


def matrices(factors: Factors, out: int, width: int) -> Tensor:
    """M_i as matrices on vec(tau); [N, out * in, out * in]."""
    basis = torch.eye(out * width).double().view(-1, 1, out, width).expand(-1, EXPERTS, -1, -1)
    return torch.stack([curvature_reference(tau, factors).flatten(1) for tau in basis], dim=-1).detach()


class Case:
    """Experts, base and factors of one map, and what the plain formula gives for them."""

    def __init__(self, kind: str, out: int, width: int, rank: int, *, base: bool) -> None:
        self.factors = curvature(kind, out, width, rank, shaken=0.5).factors
        self.experts = torch.randn(EXPERTS, out, width).double().requires_grad_()
        self.base = torch.randn(out, width).double() if base else None
        self.grad = torch.randn(EXPERTS, out, width).double()
        with torch.enable_grad():
            tau = self.experts if self.base is None else self.experts - self.base
            self.expected = curvature_reference(tau, self.factors)
        leaves = [self.experts, *self.factors]
        self.dtau, *self.dfactors = torch.autograd.grad(self.expected, leaves, self.grad)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.detach(), rtol=EXACT, atol=EXACT)


def test_the_configuration_knows_the_kinds() -> None:
    assert get_args(CurvatureConfig.model_fields["kind"].annotation) == tuple(KINDS)
    assert CurvatureConfig().kind == "kronecker"


@unhurried
@given(
    kind=KIND,
    out=SIZE,
    width=SIZE,
    rank=st.integers(1, 4),
    base=st.booleans(),
    block=st.sampled_from([1, 20, 1 << 18]),
)
def test_agrees_with_the_plain_formula(
    kind: str, out: int, width: int, rank: int, base: bool, block: int
) -> None:
    case = Case(kind, out, width, rank, base=base)
    before = [t.detach().clone() for t in (case.experts, *case.factors)]
    grad, made = case.grad.clone(), torch.empty_like(case.grad)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(blocks.BLOCK_ELEMENTS, "cpu", block)
        close(case.factors.transform(case.experts, case.base), case.expected)
        dfactors = case.factors.transform_backward(grad, case.experts, case.base, learn=True, out=made)
    close(made, case.expected)
    close(grad, case.dtau)
    assert type(dfactors) is type(case.factors)
    for found, expected in zip(dfactors, case.dfactors, strict=True):
        close(found, expected)
    for tensor, earlier in zip((case.experts, *case.factors), before, strict=True):
        assert torch.equal(tensor, earlier)


@every_kind
@torch.no_grad()
def test_only_what_is_wanted_is_made(kind: str) -> None:
    case = Case(kind, 6, 8, 2, base=True)
    grad = case.grad.clone()
    assert case.factors.transform_backward(grad, case.experts, case.base, learn=False) is None
    close(grad, case.dtau)
    grad = case.grad.clone()
    dfactors = case.factors.transform_backward(grad, case.experts, case.base, learn=True, domain=False)
    assert torch.equal(grad, case.grad) and dfactors is not None
    for found, expected in zip(dfactors, case.dfactors, strict=True):
        close(found, expected)


@every_kind
@torch.no_grad()
def test_experts_that_are_not_active_are_left_alone(kind: str) -> None:
    case = Case(kind, 6, 8, 2, base=True)
    found = case.factors.transform(case.experts, case.base, [0, 2], out=torch.full_like(case.grad, 7))
    close(found[[0, 2]], case.expected[[0, 2]])
    assert (found[1] == 7).all()
    grad = case.grad.clone()
    dfactors = case.factors.transform_backward(grad, case.experts, case.base, [0, 2], learn=True)
    close(grad[[0, 2]], case.dtau[[0, 2]])
    assert torch.equal(grad[1], case.grad[1]) and dfactors is not None
    for made, expected in zip(dfactors, case.dfactors, strict=True):
        assert not made[:, 1].any()
        close(made[:, [0, 2]], expected[:, [0, 2]])


@pytest.mark.parametrize("form", ["merge", "mix"])
@every_kind
def test_the_merged_map_takes_any_kind(kind: str, form: str) -> None:
    case = Case(kind, 6, 8, 2, base=True)
    x, s = torch.randn(4, 5, 8).double(), torch.rand(4, EXPERTS).double()
    leaves = [case.experts, *case.factors]
    y = merged_linear(x, s, case.experts, case.base, factors=case.factors, form=form)
    plain = merged_linear_reference(x, s, case.experts, case.base, factors=case.factors)
    close(y, plain)
    for found, expected in zip(
        torch.autograd.grad(y.square().sum(), leaves),
        torch.autograd.grad(plain.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-9)  # sums of squares of about 100


@every_kind
@torch.no_grad()
def test_bfloat16_is_close(kind: str) -> None:
    factors = curvature(kind, 6, 8, 2, shaken=0.1).bfloat16().factors
    experts = torch.randn(EXPERTS, 6, 8).bfloat16()
    grad = torch.randn(EXPERTS, 6, 8).bfloat16()
    wide = KINDS[kind].weight_type(*(f.double() for f in factors))
    found, expected = factors.transform(experts, None), wide.transform(experts.double(), None)
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.05)  # a few roundings of 2^-8
    given = grad.double()
    wide.transform_backward(given, experts.double(), None, learn=False)
    made = factors.transform_backward(grad, experts, None, learn=True)
    torch.testing.assert_close(grad.double(), given, rtol=0.05, atol=0.05)
    assert all(d.dtype == torch.bfloat16 for d in made)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made anew."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = {t.untyped_storage().data_ptr() for t in given}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                self.size = max(self.size, t.untyped_storage().nbytes())
        return result


@every_kind
@torch.no_grad()
def test_nothing_larger_than_one_expert_is_made(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", 1)
    monkeypatch.setattr(scratches._local, "buffers", {})  # none that is there already
    case = Case(kind, 12, 10, 1, base=True)
    out = torch.empty_like(case.grad)
    with Largest() as seen:
        case.factors.transform(case.experts, case.base, out=out)
        case.factors.transform_backward(case.grad, case.experts, case.base, learn=True, out=out)
    assert case.factors.rank * EXPERTS * 8 <= seen.size <= case.base.nbytes


# -- the start, and what training makes of it


@unhurried
@given(kind=KIND, out=SIZE, width=SIZE, rank=st.integers(1, 9))
def test_every_rank_starts_as_the_identity(kind: str, out: int, width: int, rank: int) -> None:
    made = curvature(kind, out, width, rank)
    tau, bias = torch.randn(EXPERTS, out, width).double(), torch.randn(EXPERTS, out).double()
    with torch.no_grad():
        assert torch.equal(made.factors.transform(tau, None), tau)  # further terms add exact zeros
    assert torch.equal(made.transform_bias(bias), bias)
    assert torch.equal(distance_from_identity(made.factors), torch.zeros(EXPERTS).double())


@pytest.mark.parametrize("rank", [2, 3])
@every_kind
def test_terms_come_to_differ(kind: str, rank: int) -> None:
    """Terms that start equal stay equal: after a few steps every factor's R terms are linearly independent."""
    made = curvature(kind, 6, 8, rank)
    learn(made, lambda tau: curvature_reference(tau, made.factors))
    for name, factor in zip(made.names, made.factors, strict=True):
        for i in range(EXPERTS):
            terms = factor[:, i].detach().flatten(1)
            singular = torch.linalg.svdvals(terms)
            assert singular[-1] > 1e-6 * singular[0], name  # 1e-16 for equal ones


@every_kind
def test_the_bias_has_a_map_of_its_own(kind: str) -> None:
    made = curvature(kind, 6, 8, 2, shaken=0.5)
    own = dict(made.named_parameters())
    assert set(own) == {*made.names, *made.bias_names} and not set(made.names) & set(made.bias_names)
    assert all(p.shape[1] == EXPERTS for p in own.values())  # experts are on axis 1
    tau = torch.randn(EXPERTS, 6).double()
    one, two = made.transform_bias(tau), made.transform_bias(2 * tau)
    close(two, 2 * one)
    gradients = torch.autograd.grad(one.square().sum(), [own[name] for name in made.bias_names])
    assert all(g.flatten(2).any(-1).all() for g in gradients)
    without = curvature(kind, 6, 8, 2, bias=False)
    assert set(dict(without.named_parameters())) == set(made.names) and without.bias_factors is None


# -- statistics


@unhurried
@given(kind=KIND, out=SIZE, width=SIZE, rank=st.integers(1, 4), shaken=st.sampled_from([0.3, 1e-3]))
def test_distance_is_that_of_the_matrices(kind: str, out: int, width: int, rank: int, shaken: float) -> None:
    factors = curvature(kind, out, width, rank, shaken=shaken).factors
    eye = torch.eye(out * width).double()
    expected = (matrices(factors, out, width) - eye).flatten(1).norm(dim=1) / eye.norm()
    # squared, it is a difference of traces of about out * in
    torch.testing.assert_close(distance_from_identity(factors), expected, rtol=1e-9, atol=1e-10)


@unhurried
@given(kind=KIND, out=SIZE, width=SIZE, rank=st.integers(1, 4))
def test_a_condition_number_is_that_of_the_matrix(kind: str, out: int, width: int, rank: int) -> None:
    factors = curvature(kind, out, width, rank, shaken=0.2).factors
    found = condition_number(factors)
    if found is None:
        assert rank > 1
        return
    expected = torch.linalg.cond(matrices(factors, out, width))
    # a condition number amplifies rounding by as much
    torch.testing.assert_close(found, expected, rtol=1e-12 * expected.max().item() + 1e-9, atol=0)


def test_which_condition_numbers_there_are() -> None:
    known = {
        kind: [condition_number(curvature(kind, 6, 8, r).factors) is not None for r in (1, 2)]
        for kind in KINDS
    }
    assert known == {"kronecker": [True, False], "diagonal": [True, False], "low-rank": [True, True]}


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(
        ValueError, match="unknown kind of curvature 'full': expected one of kronecker, diagonal, low-rank"
    ):
        curvature("full", 6, 8, 1)
