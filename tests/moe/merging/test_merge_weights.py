"""The merged map: what is independent of its slices, what it costs, what it saves, and mixed precision.

Its values and gradients against the plain formula are invariant 6.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from camex_ft.moe.curvature import make_curvature
from camex_ft.moe.curvature.kronecker import KroneckerFactors
from camex_ft.moe.merging import merge_weights as merge
from camex_ft.moe.merging.functional import Form
from camex_ft.moe.routing.router import Grouping
from tests.helpers.expert_layers import EXPERTS as N
from tests.helpers.expert_layers import layer_of, merged_linear, merged_linear_reference, settings, tokens

B, L, OUT, IN, RANK = 4, 5, 48, 32, 2
TOKEN = Grouping("token")


class Arguments(NamedTuple):
    x: Tensor
    weights: Tensor
    experts: Tensor
    base: Tensor | None
    factors: KroneckerFactors | None

    def leaves(self) -> list[Tensor]:
        given = [self.x, self.weights, self.experts, self.base, *(self.factors or ())]
        return [t for t in given if t is not None]


def arguments(*, tokenwise: bool = False, base: bool = True, curved: bool = True, **to: Any) -> Arguments:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    factors = None
    if curved and base:
        torch.manual_seed(0)
        made = make_curvature(out_features=OUT, in_features=IN, experts=N, rank=RANK, bias=False).factors
        factors = KroneckerFactors(
            *((f.detach() + 0.1 * draw(*f.shape)).to(**to).requires_grad_() for f in made)
        )
    groups = (B, L, N) if tokenwise else (B, N)
    experts = draw(OUT, IN) + 0.3 * draw(N, OUT, IN)
    leaf = lambda t: t.to(**to).requires_grad_()  # noqa: E731
    return Arguments(
        leaf(draw(B, L, IN)),
        leaf(draw(*groups).softmax(-1)),
        leaf(experts),
        leaf(draw(OUT, IN)) if base else None,
        factors,
    )


def signs(tau: Tensor) -> Tensor:
    return (tau.sign() == tau.sum(0).sign()).to(tau.dtype)


def call(given: Arguments, **rest: Any) -> Tensor:
    keep = signs if given.base is not None else None
    return merged_linear(*given[:4], factors=given.factors, multiplier=keep, **rest)


def forward_and_backward(given: Arguments, **rest: Any) -> list[Tensor]:
    y = call(given, **rest)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, given.leaves(), dy)]


# -- slices


@given(
    out=st.integers(1, 500),
    groups=st.integers(1, 40),
    length=st.integers(1, 99),
    width=st.integers(1, 99),
    budget=st.integers(1, 10**5),
)
def test_slices_cover_every_row_of_every_group_once(**shape: int) -> None:
    x = torch.empty(shape["groups"], shape["length"], shape["width"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(merge.SLICES, "cpu", ((0, 3, shape["budget"]),))
        cut = merge.Slices(x, shape["out"], x)
    found = [(rows, groups) for rows in cut.rows() for groups in cut.blocks()]
    met = Counter(
        (row, group)
        for rows, groups in found
        for row in range(rows.start, rows.stop)
        for group in range(groups.start, groups.stop)
    )
    assert met == {(row, group): 1 for row in range(shape["out"]) for group in range(shape["groups"])}
    for rows, groups in found:
        expected = (groups.stop - groups.start, rows.stop - rows.start, shape["width"])
        assert cut.buffer(rows, groups).shape == expected


@pytest.mark.parametrize("tokenwise", [False, True])
@pytest.mark.parametrize("base", [True, False])
def test_every_slice_budget_gives_the_same(
    base: bool, tokenwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for budget in (1, 20 * B * IN, 10**9):  # slices of 16 rows, of 20 (the last is short), of all
        monkeypatch.setitem(merge.SLICES, "cpu", ((0, 3, budget),))
        results.append(forward_and_backward(arguments(base=base, tokenwise=tokenwise), alpha=0.7))
    for found in results[:-1]:
        for actual, expected in zip(found, results[-1], strict=True):
            # float64; a product of fewer rows may sum in another order
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# -- cost


class Watch(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns, and the operations of matrix products."""

    PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.flops = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                # in elements of float32; a broadcast view holds no memory
                held = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
                self.largest = max(self.largest, held // 4)
        if func.overloadpacket.__name__ in self.PRODUCTS:
            left = [a for a in args if isinstance(a, Tensor)][-2]
            self.flops += 2 * out.numel() * left.shape[-1]
        return out


def watched(run: Callable[[], Any]) -> Watch:
    with Watch() as watch:
        run()
    return watch


def test_the_watch_sees_the_plain_formula() -> None:

    given = arguments(dtype=torch.float32)
    watch = watched(lambda: merged_linear_reference(*given[:4], factors=given.factors).sum().backward())
    assert watch.largest >= B * N * OUT * IN


@pytest.mark.parametrize("tokenwise", [False, True])
def test_no_tensor_of_every_group_and_expert_is_made(
    tokenwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(merge.SLICES, "cpu", ((0, 3, 1),))
    given = arguments(tokenwise=tokenwise, dtype=torch.float32)
    watch = watched(lambda: call(given).sum().backward())
    # parameters [N, out, in], all terms of the curvature and the tokens are the largest things there may be
    assert watch.largest <= max(N * OUT * IN, B * L * OUT) < B * OUT * IN < B * N * OUT * IN


@pytest.mark.parametrize("protocol", ["ties-ca", "dare-ca", "smear"])
@pytest.mark.parametrize("granularity", ["sequence", "segment", "token"])
def test_nor_in_a_whole_layer(protocol: str, granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(merge.SLICES, "cpu", ((0, 3, 1),))
    torch.manual_seed(0)
    grouping = Grouping(granularity, segment=2)
    layer = layer_of(settings(protocol, grouping=grouping, experts=4, top_k=4), gated=True).float()
    x = tokens(8, 2).float().requires_grad_()
    watch = watched(lambda: layer(x).sum().backward())
    out, width = layer.up.experts.shape[1:]
    assert watch.largest < 8 * 4 * out * width


@pytest.mark.parametrize("tokenwise", [False, True])
def test_what_is_saved_for_the_backward_pass_is_inputs_and_parameters(tokenwise: bool) -> None:
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    given = arguments(tokenwise=tokenwise)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call(given)
    assert set(saved) <= {t.data_ptr() for t in given.leaves()}


@pytest.mark.parametrize("curved", [False, True])
def test_forward_costs_what_the_method_says(curved: bool) -> None:
    given = arguments(curved=curved)
    dense, merging = 2 * B * L * OUT * IN, 2 * B * N * OUT * IN
    curving = 2 * RANK * N * OUT * IN * sum(f.shape[-1] for f in given.factors or ())
    assert watched(lambda: call(given, form="merge")).flops <= dense + merging + curving
    assert watched(lambda: call(given, form="mix")).flops <= dense * (1 + N) + curving


@pytest.mark.parametrize("form", ["merge", "mix"])
def test_frozen_inputs_get_no_gradient_and_no_work(form: Form) -> None:
    def flops(*trained: str) -> int:
        given = arguments(curved=False)
        for name in ("x", "weights", "experts", "base"):
            getattr(given, name).requires_grad_(name in trained)
        y = call(given, form=form)
        dy = torch.ones_like(y)
        found = watched(lambda: y.backward(dy)).flops
        for name in ("x", "weights", "experts", "base"):
            assert (getattr(given, name).grad is not None) == (name in trained), name
        return found

    one = 2 * B * L * OUT * IN  # a product with every token
    merging = 2 * B * N * OUT * IN
    only_x, everything = flops("x"), flops("x", "weights", "experts", "base")
    assert only_x <= (one * (1 + N) if form == "mix" else one + merging)
    assert flops("experts") < everything
    assert everything - only_x >= one
    assert flops("base") <= one + (
        one * N if form == "mix" else merging + 2 * B * OUT * IN
    )  # E_m is also in every tau


def test_frozen_curvature_is_not_differentiated() -> None:
    given = arguments()
    for factor in given.factors or ():
        factor.requires_grad_(False)
    y = call(given)
    frozen = watched(lambda: y.sum().backward()).flops
    trained = arguments()
    y = call(trained)
    assert frozen < watched(lambda: y.sum().backward()).flops
    assert all(f.grad is None for f in given.factors or ())
    assert all(f.grad is not None for f in trained.factors or ())
    torch.testing.assert_close(given.experts.grad, trained.experts.grad, rtol=1e-12, atol=1e-12)


# -- precision

BF16 = 2.0**-8  # relative error of one rounding to bfloat16, at most


def rounded(times: int) -> float:
    """Relative error of that many independent roundings to bfloat16: each is uniform, so its square is a third."""
    return math.sqrt(times / 3) * BF16


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", ["merge", "mix"])
def test_autocast_rounds_the_products_with_tokens_only(form: Form) -> None:
    exact = forward_and_backward(arguments())
    given = arguments(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(given, form=form)
    assert y.dtype == torch.bfloat16
    found = forward_and_backward_of(y, given)
    # x, E_hat and y once each; mixed: x, s, s * x, T, the product and y, the sum is in float32
    assert relative(found[0], exact[0]) < rounded(6 if form == "mix" else 3)
    for actual, expected, leaf in zip(found[1:], exact[1:], given.leaves(), strict=True):
        assert actual.dtype == leaf.dtype == torch.float32
        # dy and products with it too; mixed, the base's gradient is a difference of N + 1 rounded products
        times = 6 if form == "merge" else 8 * (1 + N) if leaf is given.base else 8
        assert relative(actual, expected) < rounded(times)


def forward_and_backward_of(y: Tensor, given: Arguments) -> list[Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, given.leaves(), dy)]


def test_small_domain_vectors_survive_autocast() -> None:
    """In bfloat16 experts that differ by 1e-4 would be equal, and no gradient would reach the router."""

    def gradient(dtype: torch.dtype, autocast: bool) -> Tensor:
        given = arguments(curved=False, dtype=dtype)
        with torch.no_grad():
            tau = torch.randn(N, OUT, IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
            given.base.copy_(given.base.double().round(decimals=2))
            given.experts.copy_(given.base + 1e-4 * tau.to(dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = merged_linear(*given[:4])
        return torch.autograd.grad(y, given.weights, torch.ones_like(y))[0]

    # float32 rounds tau to about 1e-7 / 1e-4 of itself; x, H and dy are bfloat16
    assert relative(gradient(torch.float32, True), gradient(torch.float64, False)) < rounded(6)


def test_a_multiplier_that_is_one_everywhere_may_be_none() -> None:
    given = arguments()
    ones = merged_linear(*given[:4], multiplier=torch.ones_like, factors=given.factors)
    assert torch.equal(merged_linear(*given[:4], multiplier=lambda tau: None, factors=given.factors), ones)
    assert torch.equal(merged_linear(*given[:4], multiplier=None, factors=given.factors), ones)
