"""Invariant 5: what merging must equal where the answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from camex_ft.moe.config import LayerSettings
from camex_ft.moe.layers.expert_linear import ExpertLinear
from camex_ft.moe.routing.router import topk_softmax
from camex_ft.upcycling import expert_layers
from camex_ft.utils.registry import PROTOCOLS
from tests.helpers.invariant_cases import Case, cases, output, shake, upcycled
from tests.helpers.tiny import inputs_of

# float64: sums of at most a few hundred products of numbers of about 1
TOLERANCE = 1e-12
MERGING = [n for n in PROTOCOLS.names() if PROTOCOLS.get(n).form == "weights"]
WITH_BASE = [n for n in MERGING if PROTOCOLS.get(n).base]
CURVED = [n for n in MERGING if PROTOCOLS.get(n).curvature]
SIZES = st.tuples(st.integers(2, 5), st.sampled_from([1, 4, 6, 7, 12]), st.sampled_from([1, 4, 6, 10]))


def linear_of(
    protocol: str, size: tuple[int, int, int], seed: int, *, rank: int = 2, bias: bool = True
) -> ExpertLinear:
    """Return N experts of an [out, in] map with random parameters, in evaluation mode and float64."""
    experts, out, width = size
    entry = PROTOCOLS.get(protocol)
    layer = LayerSettings(
        rule=entry, experts=experts, top_k=experts, base=entry.base, rank=rank if entry.curvature else 0
    )
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.zeros(out, width, dtype=torch.float64)
    linear = ExpertLinear(zeros, zeros[:, 0] if bias else None, layer).eval()
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return linear


def inputs(linear: ExpertLinear, seed: int, *, groups: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(groups, 4, linear.experts.shape[2], generator=generator, dtype=torch.float64)
    logits = torch.randn(groups, linear.experts.shape[0], generator=generator, dtype=torch.float64)
    return x, logits.softmax(-1)


def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(
        ours, theirs, rtol=TOLERANCE, atol=TOLERANCE * max(1.0, float(theirs.detach().abs().max()))
    )


@given(size=SIZES, seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("protocol", MERGING)
def test_equal_experts_give_that_expert(protocol: str, size: tuple[int, int, int], seed: int) -> None:
    linear = linear_of(protocol, size, seed)
    linear.experts.data[:] = linear.experts.data[:1]
    linear.expert_bias.data[:] = linear.expert_bias.data[:1]
    if linear.curvature is not None:
        linear.curvature.reset_parameters()  # another curvature would move the domain vectors
    x, s = inputs(linear, seed)
    close(linear(x, s), dense(x, linear.experts[0], linear.expert_bias[0]))


@given(size=SIZES, seed=st.integers(0, 99), chosen=st.integers(0, 1))
@settings(max_examples=10, deadline=None)
def test_one_hot_routing_gives_that_expert(size: tuple[int, int, int], seed: int, chosen: int) -> None:
    linear = linear_of("smear", size, seed)
    x, s = inputs(linear, seed)
    s = torch.zeros_like(s)
    s[:, chosen] = 1
    close(linear(x, s), dense(x, linear.experts[chosen], linear.expert_bias[chosen]))


@given(size=SIZES, seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("protocol", WITH_BASE)
def test_no_domain_vectors_give_the_base(protocol: str, size: tuple[int, int, int], seed: int) -> None:
    linear = linear_of(protocol, size, seed)
    linear.experts.data[:] = linear.base.data
    linear.expert_bias.data[:] = linear.base_bias.data
    x, s = inputs(linear, seed)
    close(linear(x, s), dense(x, linear.base, linear.base_bias))


@given(size=SIZES, seed=st.integers(0, 99), rank=st.integers(1, 4))
@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("protocol", CURVED)
def test_identity_curvature_gives_the_euclidean_protocol(
    protocol: str, size: tuple[int, int, int], seed: int, rank: int
) -> None:
    curved = linear_of(protocol, size, seed, rank=rank)
    curved.curvature.reset_parameters()
    flat = linear_of(protocol.removesuffix("-ca"), size, seed)
    for name in ("experts", "base", "expert_bias", "base_bias"):
        flat.get_parameter(name).data = curved.get_parameter(name).data
    x, s = inputs(curved, seed)
    close(curved(x, s), flat(x, s))


@pytest.mark.parametrize("seed", range(3))
def test_smear_is_domain_at_alpha_one(seed: int) -> None:
    domain, smear = (linear_of(name, (4, 6, 10), seed) for name in ("domain", "smear"))
    smear.experts.data, smear.expert_bias.data = domain.experts.data, domain.expert_bias.data
    x, s = inputs(domain, seed)
    close(smear(x, s), domain(x, s))


@given(seed=st.integers(0, 99), top_k=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("protocol", MERGING)
def test_experts_that_are_not_chosen_do_not_matter(protocol: str, seed: int, top_k: int) -> None:
    linear = linear_of(protocol, (5, 6, 4), seed)
    if protocol.removesuffix("-ca") not in ("domain", "smear", "dare"):
        pytest.skip("the sign is elected by all experts, chosen or not")
    x, s = inputs(linear, seed, groups=1)
    s = topk_softmax(s.log(), top_k=top_k)
    before = linear(x, s)
    linear.experts.data[s[0] == 0] += 1
    linear.expert_bias.data[s[0] == 0] += 1
    close(linear(x, s), before)


ORDER = [2, 0, 1]


@pytest.mark.parametrize(
    "case", [c for c in cases("sequence-classification") if c.protocol != "dense"], ids=str
)
def test_order_of_experts_does_not_matter(case: Case) -> None:
    """Permuting the experts of every layer together with their router columns changes nothing."""
    model = shake(upcycled(case)).double()
    given = inputs_of(model, case.head)
    with torch.no_grad():
        before = output(model, given)
        for layer in expert_layers(model).values():
            for name, parameter in layer.named_parameters():
                if "base" in name:
                    continue
                axis = 1 if name in ("router.gate", "router.noise") or ".curvature." in name else 0
                parameter.copy_(parameter.index_select(axis, torch.tensor(ORDER)))
        after = output(model, given)
    torch.testing.assert_close(
        after, before, rtol=1e-9, atol=1e-9
    )  # a whole model: thousands of sums reordered


def test_settings_are_frozen() -> None:
    layer = LayerSettings(rule=PROTOCOLS.get("domain"), experts=2, top_k=2)
    with pytest.raises(AttributeError):
        layer.alpha = 2.0  # type: ignore[misc]
    assert replace(layer, alpha=2.0).alpha == 2.0
