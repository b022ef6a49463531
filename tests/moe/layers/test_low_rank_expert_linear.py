"""Low-rank experts against whole ones and the plain formula: values, gradients, what is saved, what is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from camex_ft.moe.context import RoutingContext
from camex_ft.moe.curvature import KINDS, make_curvature
from camex_ft.moe.layers.expert_linear import ExpertLinear
from camex_ft.moe.layers.ffn import ExpertFFN, MergedFFN, MixtureFFN
from camex_ft.moe.layers.low_rank_expert_linear import LowRank, LowRankLinear
from camex_ft.moe.merging.caching import ParameterCache
from camex_ft.moe.merging.reference import curvature_reference
from camex_ft.moe.routing.router import Grouping, RouterSettings
from camex_ft.upcycling.expert_init import add_noise
from tests.helpers.expert_layers import HIDDEN, INNER, maps, merged_linear_reference, read, settings, tokens

G, L, N, OUT, IN = 4, 3, 3, 6, 8
EXACT = 1e-11  # float64, sums of about 100 products of numbers of about 1
BEFORE = RouterSettings(normalise="before")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def shaken(module: Any, scale: float = 0.3) -> Any:
    torch.manual_seed(1)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def linear(
    *,
    rank: int = 2,
    bias: bool = True,
    protocol: str = "domain-ca",
    scale: float = 1.5,
    dropout: float = 0.0,
    shape: tuple[int, int] = (OUT, IN),
    **rest: Any,
) -> LowRankLinear:
    """A map whose experts, biases and curvature have moved; float64."""
    torch.manual_seed(0)
    out, width = shape
    low_rank = LowRank(rank=rank, scale=scale, dropout=dropout)
    made = LowRankLinear(
        draw(out, width), draw(out) if bias else None, settings(protocol, **rest), low_rank=low_rank
    )
    return shaken(made.double())


def whole(low: LowRankLinear, **rest: Any) -> ExpertLinear:
    """The same map with whole experts."""
    protocol = "domain-ca" if low.curvature is not None else "domain"
    made = ExpertLinear(
        low.base, low.base_bias if low.base_bias is not None else low.expert_bias, settings(protocol, **rest)
    ).double()
    with torch.no_grad():
        made.experts.copy_(low.base + low.vectors())
        if low.expert_bias is not None:
            made.expert_bias.copy_(low.expert_bias)
        if low.curvature is not None:
            made.curvature.load_state_dict(low.curvature.state_dict())
    return made


def routed(token: bool = False) -> Tensor:
    return draw(*((G, L, N) if token else (G, N)), seed=3).softmax(-1).requires_grad_()


# -- curvature on the factors


@given(
    st.sampled_from(list(KINDS)), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4)
)
def test_curved_factors_multiply_to_the_curved_matrix(
    kind: str, out: int, width: int, terms: int, rank: int
) -> None:
    torch.manual_seed(0)
    curvature = make_curvature(
        out_features=out, in_features=width, experts=2, rank=terms, bias=False, kind=kind
    ).double()
    shaken(curvature)
    left, right = draw(2, out, rank), draw(2, rank, width, seed=1)
    high, wide = curvature.factors.transform_pair(left, right)
    assert high.shape[2] == wide.shape[1] == (rank if kind == "low-rank" else terms * rank)
    torch.testing.assert_close(
        high @ wide, curvature_reference(left @ right, curvature.factors), rtol=EXACT, atol=EXACT
    )


# -- full rank: the full experts


@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("terms", [0, 1, 2])
@pytest.mark.parametrize("kind", list(KINDS))
def test_full_rank_equals_whole_experts(kind: str, terms: int, bias: bool, token: bool) -> None:
    """Values and all gradients; those of B and A follow from that of E by the product rule."""
    rest = {"curvature": kind, "rank": terms, "alpha": 0.7}
    protocol = "domain-ca" if terms else "domain"
    made = LowRankLinear(
        draw(OUT, IN),
        draw(OUT) if bias else None,
        settings(protocol, **rest),
        low_rank=LowRank(rank=min(OUT, IN), scale=1.5),
    )
    low = shaken(made.double())
    full = whole(low, **rest)
    x, s = draw(G, L, IN, seed=2).requires_grad_(), routed(token)
    y, expected = low(x, s), full(x, s)
    torch.testing.assert_close(y, expected, rtol=EXACT, atol=EXACT)
    dy = draw(*y.shape, seed=4)
    shared = [name for name, p in low.named_parameters() if "curvature" in name or name == "expert_bias"]
    both = [dict(module.named_parameters()) for module in (low, full)]
    found = torch.autograd.grad(
        y, [x, s, low.expert_out, low.expert_in, *(both[0][n] for n in shared)], dy, retain_graph=True
    )
    due = torch.autograd.grad(expected, [x, s, full.experts, *(both[1][n] for n in shared)], dy)
    d_expert = 1.5 * due[2]  # tau = c B A
    due = (*due[:2], d_expert @ low.expert_in.mT, low.expert_out.mT @ d_expert, *due[3:])
    for one, other in zip(found, due, strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)
    for one, other in zip(low.merged(routed().detach()), full.merged(routed().detach()), strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_low_rank_is_the_plain_formula(kind: str, token: bool) -> None:
    low = linear(curvature=kind, bias=False, alpha=0.7)
    x, s = draw(G, L, IN, seed=2), routed(token)
    experts = low.base + 1.5 * low.expert_out @ low.expert_in
    expected = merged_linear_reference(x, s, experts, low.base, alpha=0.7, factors=low.curvature.factors)
    torch.testing.assert_close(low(x, s), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradients_are_finite_differences(kind: str) -> None:
    low = linear(curvature=kind, shape=(4, 6), rank=1, experts=2)
    x = draw(2, 2, 6, seed=2).requires_grad_()
    s = draw(2, 2, seed=3).softmax(-1).requires_grad_()
    leaves = [p for p in low.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, s, *_: low(x, s), (x, s, *leaves))


# -- layers


def layer(protocol: str, *, gated: bool = False, rank: int = 2, **rest: Any) -> ExpertFFN:
    given = settings(protocol, **rest)
    kind = MixtureFFN if given.rule.form == "outputs" else MergedFFN
    context = RoutingContext(read)
    torch.manual_seed(0)
    made = kind(
        maps(gated=gated),
        nn.GELU(),
        name="layer",
        stack="encoder",
        context=context,
        settings=given,
        low_rank=LowRank(rank=rank),
    )
    return made.double()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("protocol", ["domain", "domain-ca", "smear", "smoe"])
def test_a_layer_starts_as_the_dense_one(protocol: str, gated: bool) -> None:
    token = protocol == "smoe"
    made = layer(protocol, gated=gated, grouping=Grouping(granularity="token" if token else "sequence"))
    weights = {n: (w.double(), None if b is None else b.double()) for n, (w, b) in maps(gated=gated).items()}
    x = tokens(2, 5)
    inner = nn.GELU()(nn.functional.linear(x, *weights["gate" if gated else "up"]))
    inner = inner * nn.functional.linear(x, *weights["up"]) if gated else inner
    torch.testing.assert_close(made(x), nn.functional.linear(inner, *weights["down"]), rtol=EXACT, atol=EXACT)


def test_smear_is_domain_on_a_frozen_base() -> None:
    smear, domain = shaken(layer("smear")), shaken(layer("domain"))
    domain.load_state_dict({**domain.state_dict(), **smear.state_dict()})
    torch.testing.assert_close(smear(tokens(2, 5)), domain(tokens(2, 5)), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("token", [False, True])
def test_smear_scales_with_weights_that_sum_to_less_than_one(token: bool) -> None:
    low = linear(protocol="smear", top_k=2, router=BEFORE, bias=False)
    s, x = 0.6 * routed(token), draw(G, L, IN, seed=2)
    expected = merged_linear_reference(x, s, low.base + low.vectors(), None)
    torch.testing.assert_close(low(x, s), expected, rtol=EXACT, atol=EXACT)
    if not token:
        torch.testing.assert_close(low.merged(s)[0], torch.einsum("gn,noi->goi", s, low.base + low.vectors()))


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_mixture_is_that_of_whole_experts(top_k: int) -> None:
    given = {"grouping": Grouping(granularity="token"), "top_k": top_k}
    low = shaken(layer("smoe", **given))
    full = MixtureFFN(
        maps(),
        nn.GELU(),
        name="layer",
        stack="encoder",
        context=RoutingContext(read),
        settings=settings("smoe", **given),
    ).double()
    full.router.load_state_dict(low.router.state_dict())
    with torch.no_grad():
        for name, one in low.linears.items():
            full.linears[name].experts.copy_(one.base + one.vectors())
            full.linears[name].expert_bias.copy_(one.expert_bias)
    torch.testing.assert_close(low(tokens(2, 5)), full(tokens(2, 5)), rtol=EXACT, atol=EXACT)


def test_only_the_base_is_frozen() -> None:
    made = layer("domain-ca")
    frozen = {name for name, p in made.named_parameters() if not p.requires_grad}
    assert frozen == {"up.base", "up.base_bias", "down.base", "down.base_bias"}
    made(tokens(2, 5)).sum().backward()
    assert all(p.grad is not None for n, p in made.named_parameters() if n not in frozen and "noise" not in n)


# -- what it takes


def test_nothing_as_large_as_a_matrix_is_saved() -> None:
    """Saved are x, x times A, that times s, and the parameters: no E_hat [G, out, in], no tau [N, out, in]."""
    low = linear(shape=(64, 96), curvature="kronecker", bias=False, rank=2)
    own = {p.untyped_storage().data_ptr() for p in low.parameters()}
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            sizes.append(tensor.numel())
        return tensor

    x = draw(G, L, 96).requires_grad_()
    with saved_tensors_hooks(note, lambda tensor: tensor):
        low(x, routed())
    # the largest are x [4, 3, 96] and B' [3, 64, 4], A' [3, 4, 96]
    assert sizes and max(sizes) == N * 4 * 96 < 64 * 96


def test_curved_factors_are_kept_in_evaluation_until_a_parameter_changes() -> None:
    low, cache = linear().eval(), ParameterCache()
    with torch.no_grad():
        first = low.factors(cache)
        assert low.factors(cache) is first
        low.expert_out.mul_(2)
        changed = low.factors(cache)
        assert changed is not first
        torch.testing.assert_close(changed[0], 2 * first[0])
        twin = copy.deepcopy(low)
        twin.curvature.a1.add_(1)
        torch.testing.assert_close(low.factors(cache)[0], changed[0])
        assert not torch.equal(twin.factors(cache)[0], changed[0])
        low.expert_out.data.mul_(2)
        torch.testing.assert_close(low.factors()[0], 2 * changed[0])  # outside of a scope nothing is cached
        low.expert_out.data.div_(2)
    assert low.factors(cache)[0].requires_grad  # where gradients are on they are made anew
    with torch.inference_mode():
        torch.testing.assert_close(low.factors(cache)[0], changed[0])


def test_dropout_is_for_training_and_the_experts_alone() -> None:
    low = linear(dropout=0.5, bias=False)
    x, s = draw(G, L, IN), routed()
    torch.manual_seed(0)
    kept = nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    expected = low.eval()(kept, s) + (x - kept) @ low.base.mT
    torch.testing.assert_close(low.train()(x, s), expected, rtol=EXACT, atol=EXACT)
    assert torch.equal(low.eval()(x, s), low(x, s))


@pytest.mark.parametrize("autocast", [False, True])
def test_precision(autocast: bool) -> None:
    """What is trained is float32 on a base of bfloat16, and products are in bfloat16."""
    weight, bias = (t.to(torch.float32 if autocast else torch.bfloat16) for t in (draw(OUT, IN), draw(OUT)))
    low = shaken(LowRankLinear(weight, bias, settings("domain-ca"), low_rank=LowRank(rank=2)))
    assert all(p.dtype == torch.float32 for p in low.parameters() if p.requires_grad)
    x, s = draw(G, L, IN).to(weight.dtype), routed().float().detach()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = low(x, s)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in low.parameters() if p.requires_grad)
    exact = copy.deepcopy(low).double()
    # 8 bits of mantissa, sums of about 20 products of numbers of about 1, rounded three times
    torch.testing.assert_close(y.double(), exact(x.double(), s.double()), rtol=0.05, atol=0.1)


def test_gram_matrix() -> None:
    low = linear()
    tau = low.vectors().flatten(1)
    torch.testing.assert_close(low.gram(), tau @ tau.mT, rtol=EXACT, atol=EXACT)


def test_noise_has_the_wanted_size() -> None:
    made = MergedFFN(
        {"up": (draw(300, 200).float(), None), "down": (draw(200, 300, seed=1).float(), None)},
        nn.GELU(),
        name="layer",
        stack="encoder",
        context=RoutingContext(read),
        settings=settings("domain"),
        low_rank=LowRank(rank=8, scale=0.5),
    )
    torch.manual_seed(0)
    add_noise([made], 0.1)
    for low in made.linears.values():
        # 8 * 500 draws decide it: a standard error of about 2 in 100; five of them
        assert (low.vectors().std() / low.base.std()).item() == pytest.approx(0.1, rel=0.1)
        assert not torch.equal(low.expert_out[0], low.expert_out[1])


def test_sizes() -> None:
    made = layer("domain-ca", rank=3)
    assert (made.up.out_features, made.up.in_features) == (INNER, HIDDEN)
    assert made.up.expert_out.shape == (N, INNER, 3) and made.up.expert_in.shape == (N, 3, HIDDEN)
    assert "rank=3" in repr(made.up)
