"""Invariant 6: the fast path's values and gradients are those of the plain formula under autograd, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from camex_ft.moe.curvature.kronecker import KroneckerFactors, nearest_factors
from camex_ft.moe.merging import merge_weights as merge
from camex_ft.utils.registry import PROTOCOLS
from tests.helpers.expert_layers import merged_linear, merged_linear_reference, multiplier_of

# float64: sums of up to a few thousand products of numbers of about 1, in another order
TOLERANCE = 1e-10
MERGING = [n for n in PROTOCOLS.names() if PROTOCOLS.get(n).form == "weights"]
NAMES = ("x", "weights", "experts", "base", *KroneckerFactors._fields)


@st.composite
def shapes(draw: Any) -> dict[str, int]:
    """Groups, tokens, experts, out, in (primes and products), rank, seed."""
    dimension = st.sampled_from([1, 2, 5, 6, 8, 12])
    return {
        "groups": draw(st.integers(1, 4)),
        "tokens": draw(st.integers(1, 5)),
        "experts": draw(st.integers(2, 4)),
        "out": draw(dimension),
        "width": draw(dimension),
        "rank": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 999)),
    }


def tensors_of(protocol: str, shape: dict[str, int], *, by_token: bool) -> dict[str, Tensor]:
    """Return leaves with gradients: x, weights, experts and, as the protocol has them, base and curvature factors."""
    entry = PROTOCOLS.get(protocol)
    generator = torch.Generator().manual_seed(shape["seed"])
    g, length, n, out, width = (shape[k] for k in ("groups", "tokens", "experts", "out", "width"))

    def leaf(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()

    made = {"x": leaf(g, length, width), "weights": leaf(g, length, n) if by_token else leaf(g, n)}
    made["experts"] = leaf(n, out, width)
    if entry.base:
        made["base"] = leaf(out, width)
    if entry.curvature:
        sizes = (*nearest_factors(out), *nearest_factors(width))
        for name, size in zip(KroneckerFactors._fields, sizes, strict=True):
            made[name] = leaf(shape["rank"], n, size, size)
    return made


def call(function: Any, protocol: str, tensors: dict[str, Tensor], *, training: bool = True) -> Tensor:
    factors = KroneckerFactors(*(tensors[n] for n in KroneckerFactors._fields)) if "a1" in tensors else None
    keep = multiplier_of(PROTOCOLS.get(protocol), training=training, seed=11)
    return function(
        tensors["x"],
        tensors["weights"],
        tensors["experts"],
        tensors.get("base"),
        alpha=0.7,
        multiplier=keep,
        factors=factors,
    )


@pytest.fixture(params=[1, 1 << 21], ids=["small slices", "one slice"])
def slice_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Slices of 16 rows, the least there is, and slices that hold everything."""
    monkeypatch.setitem(merge.SLICES, "cpu", ((0, 3, request.param),))
    return request.param


@given(shape=shapes())
@settings(max_examples=12, deadline=None)
@pytest.mark.parametrize("by_token", [False, True], ids=["merged", "mixed"])
@pytest.mark.parametrize("protocol", MERGING)
def test_fast_path_agrees_with_the_plain_formula(
    protocol: str, by_token: bool, shape: dict[str, int]
) -> None:
    tensors = tensors_of(protocol, shape, by_token=by_token)
    fast, plain = (call(f, protocol, tensors) for f in (merged_linear, merged_linear_reference))
    close(fast, plain, "y")
    upstream = torch.randn(fast.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = list(tensors.values())
    ours = torch.autograd.grad(fast, leaves, upstream)
    theirs = torch.autograd.grad(plain, leaves, upstream)
    for name, mine, oracle in zip(tensors, ours, theirs, strict=True):
        close(mine, oracle, name)


@pytest.mark.parametrize("protocol", MERGING)
@pytest.mark.parametrize("out", [40, 33])
def test_slices_change_nothing(protocol: str, out: int, slice_elements: int) -> None:
    shape = {"groups": 3, "tokens": 4, "experts": 3, "out": out, "width": 6, "rank": 2, "seed": 5}
    tensors = tensors_of(protocol, shape, by_token=False)
    fast, plain = (call(f, protocol, tensors) for f in (merged_linear, merged_linear_reference))
    close(fast, plain, "y")
    ours = torch.autograd.grad(fast.square().sum(), list(tensors.values()))
    theirs = torch.autograd.grad(plain.square().sum(), list(tensors.values()))
    for name, mine, oracle in zip(tensors, ours, theirs, strict=True):
        close(mine, oracle, name)


@pytest.mark.parametrize("by_token", [False, True], ids=["merged", "mixed"])
@pytest.mark.parametrize("protocol", MERGING)
def test_gradcheck(protocol: str, by_token: bool) -> None:
    """Against finite differences, which know nothing of the formula; only smooth in tau away from a change of sign."""
    shape = {"groups": 2, "tokens": 2, "experts": 2, "out": 4, "width": 4, "rank": 2, "seed": 2}
    tensors = tensors_of(protocol, shape, by_token=by_token)

    def function(*leaves: Tensor) -> Tensor:
        return call(merged_linear, protocol, dict(zip(tensors, leaves, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("frozen", NAMES)
@pytest.mark.parametrize("protocol", [n for n in MERGING if PROTOCOLS.get(n).curvature])
def test_frozen_tensors_leave_the_other_gradients_as_they_are(protocol: str, frozen: str) -> None:
    shape = {"groups": 2, "tokens": 3, "experts": 3, "out": 6, "width": 4, "rank": 2, "seed": 9}
    tensors = tensors_of(protocol, shape, by_token=False)
    full = torch.autograd.grad(call(merged_linear, protocol, tensors).square().sum(), list(tensors.values()))
    expected = dict(zip(tensors, full, strict=True))
    tensors[frozen] = tensors[frozen].detach()
    call(merged_linear, protocol, tensors).square().sum().backward()
    assert tensors[frozen].grad is None
    for name, tensor in tensors.items():
        if name != frozen:
            close(tensor.grad, expected[name], name)


def close(ours: Tensor | None, theirs: Tensor, name: str) -> None:
    assert ours is not None, name
    scale = max(1.0, float(theirs.detach().abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * scale, msg=lambda m: f"{name}: {m}")
