"""The merged map's two forms, sparse weights, shared domain vectors: all give what the plain formula gives."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from camex_ft.moe.curvature.kronecker import KroneckerFactors, nearest_factors
from camex_ft.moe.merging import functional as linear
from camex_ft.moe.merging import mix_outputs
from camex_ft.moe.merging.domain_vectors import CachedVectors, Multiplier
from camex_ft.moe.merging.functional import Form
from tests.helpers.expert_layers import merged_linear, merged_linear_reference, product

G, L, N, OUT, IN = 5, 3, 4, 12, 8
EXACT = 1e-11  # float64, sums of about 100 products of numbers of about 1
FORMS: list[Form] = ["merge", "mix"]


def signs(tau: Tensor) -> Tensor:
    return (tau.sign() == tau.sum(0).sign()).to(tau.dtype)


def drawn(tau: Tensor) -> Tensor:
    return torch.rand(tau.shape, generator=torch.Generator().manual_seed(5), dtype=tau.dtype)


MULTIPLIERS: dict[str, Multiplier | None] = {
    "none": None,
    "pointwise": Multiplier(signs, pointwise=True),
    "whole": Multiplier(drawn),
}


def problem(*, used: int = N, rank: int = 2, base: bool = True, groups: int = G) -> dict[str, Any]:
    """Tensors of one map; of each group's weights all but `used` are 0."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    logits = draw(groups, N)
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(used).indices, 1.0)
    sizes = (*nearest_factors(OUT), *nearest_factors(IN))
    factors = (
        KroneckerFactors(*(draw(rank, N, k, k).requires_grad_() for k in sizes)) if rank and base else None
    )
    return {
        "x": draw(groups, L, IN).requires_grad_(),
        "weights": (logits.softmax(1) * chosen).requires_grad_(),
        "experts": draw(N, OUT, IN).requires_grad_(),
        "base": draw(OUT, IN).requires_grad_() if base else None,
        "factors": factors,
    }


def leaves(given: dict[str, Any]) -> list[Tensor]:
    named = [given[name] for name in ("x", "weights", "experts", "base")]
    return [t for t in (*named, *(given["factors"] or ())) if t is not None]


def gradients(y: Tensor, given: dict[str, Any]) -> list[Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves(given), dy)]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)


@pytest.fixture(params=["by expert", "at once"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways to mix: a CPU's, and that of other devices."""
    if request.param == "at once":
        monkeypatch.setattr(mix_outputs, "at_once", lambda x: True)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("multiplier", MULTIPLIERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize(("base", "rank"), [(True, 2), (True, 0), (False, 0)])
def test_every_way_through_is_the_plain_formula(
    form: Form, multiplier: str, base: bool, rank: int, once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "transforms_once", lambda shape: once)
    given = problem(base=base, rank=rank)
    rest: dict[str, Any] = {"alpha": 0.7, "multiplier": MULTIPLIERS[multiplier] if base else None}
    plain = gradients(merged_linear_reference(**given, **rest), given)
    same(gradients(merged_linear(**given, **rest, form=form), given), plain)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("multiplier", MULTIPLIERS)
def test_any_part_may_be_frozen(
    form: Form, multiplier: str, once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "transforms_once", lambda shape: once)
    names = ("x", "weights", "experts", "base", "factors")
    for trained in (chosen for n in range(1, 5) for chosen in combinations(names, n)):
        given = problem()
        tensors = {name: list(given[name]) if name == "factors" else [given[name]] for name in names}
        for name in names:
            for tensor in tensors[name]:
                tensor.requires_grad_(name in trained)
        wanted = [tensor for name in trained for tensor in tensors[name]]
        y = merged_linear(**given, multiplier=MULTIPLIERS[multiplier], form=form)
        plain = merged_linear_reference(**given, multiplier=MULTIPLIERS[multiplier])
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        same(list(torch.autograd.grad(y, wanted, dy)), list(torch.autograd.grad(plain, wanted, dy)))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("multiplier", MULTIPLIERS)
@pytest.mark.parametrize(
    ("groups", "used"), [(5, 2), (1, 2), (2, 1)]
)  # with one or two groups some experts are idle
def test_sparse_weights_are_the_same_sum(form: Form, multiplier: str, groups: int, used: int) -> None:
    given = problem(used=used, groups=groups)
    y = merged_linear(**given, multiplier=MULTIPLIERS[multiplier], sparse=True, form=form)
    found = gradients(y, given)
    expected = gradients(merged_linear_reference(**given, multiplier=MULTIPLIERS[multiplier]), given)
    expected[2] = expected[2].where(given["weights"] != 0, 0)  # a zero is a constant
    same(found, expected)


def test_idle_experts_are_not_curved(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    transform = KroneckerFactors.transform
    monkeypatch.setattr(
        KroneckerFactors, "transform", lambda *args, **rest: seen.append(args[3]) or transform(*args, **rest)
    )
    given = problem(used=1, groups=1)
    merged_linear(**given, sparse=True, form="merge")
    assert len(seen) == 1 and len(seen[0]) == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("multiplier", MULTIPLIERS)
def test_shared_vectors_gather_the_gradient_of_all_calls(form: Form, multiplier: str) -> None:
    given = problem()
    rest: dict[str, Any] = {"multiplier": MULTIPLIERS[multiplier], "form": form}
    alone = [gradients(merged_linear(**given, **rest), given) for _ in range(3)]
    with torch.no_grad():
        parts = {name: given[name] for name in ("experts", "base", "factors")}
        shared = CachedVectors(product(**parts, multiplier=MULTIPLIERS[multiplier]).transform())
    for leaf in leaves(given):
        leaf.grad = None
    for call in range(3):
        y = merged_linear(**given, **rest, cached=shared, last=call == 2)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        if call < 2:
            y.backward(dy)
            assert given["experts"].grad is None and given["factors"].a1.grad is None
        else:
            y.backward(dy)
    same([leaf.grad for leaf in leaves(given)], [3 * g for g in alone[0][1:]])
    with pytest.raises(RuntimeError, match="ran twice in the last micro-batch"):
        merged_linear(**given, **rest, cached=shared).sum().backward()


def test_the_chosen_form_is_the_cost_model_s(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem()
    for form in FORMS:
        monkeypatch.setattr(linear, "cheaper", lambda shape, form=form: form)
        assert torch.equal(merged_linear(**given), merged_linear(**given, form=form))
    assert not torch.equal(merged_linear(**given, form="merge"), merged_linear(**given, form="mix"))
