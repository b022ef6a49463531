"""Expert layers: what they compute, where dropout is, what they draw at random, what they refuse."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from camex_ft.moe.context import ForwardState, RoutingContext
from camex_ft.moe.layers.ffn import MergedFFN
from camex_ft.moe.merging.domain_vectors import Multiplier
from camex_ft.moe.routing.router import Grouping
from tests.helpers.expert_layers import EXPERTS, HIDDEN, INNER, layer_of, maps, settings, tokens

EXACT = 1e-12  # float64, sums of at most a dozen terms
TOKEN = Grouping("token")


def by_hand(layer: Any, x: Tensor, s: Tensor, kept: Tensor | float = 1.0) -> Tensor:
    """One sequence [L, d] through maps merged by hand: E_m + sum_i s_i (E_i - E_m); `kept` times what enters `down`."""

    def merged(linear: Any) -> tuple[Tensor, Tensor]:
        weight, bias = linear.base.clone(), linear.base_bias.clone()
        for i in range(EXPERTS):
            weight = weight + s[i] * (linear.experts[i] - linear.base)
            bias = bias + s[i] * (linear.expert_bias[i] - linear.base_bias)
        return weight, bias

    if layer.gate is None:
        inner = F.gelu(F.linear(x, *merged(layer.up)))
    else:
        inner = F.gelu(F.linear(x, *merged(layer.gate))) * F.linear(x, *merged(layer.up))
    return F.linear(inner * kept, *merged(layer.down))


@pytest.mark.parametrize("gated", [False, True])
def test_a_merged_layer_is_one_feed_forward_layer(gated: bool) -> None:
    layer, x = layer_of(settings("domain"), gated=gated).eval(), tokens(2, 4)
    found = layer(x)
    for b in range(2):
        s = layer.router(x[b].mean(0)).weights
        torch.testing.assert_close(found[b], by_hand(layer, x[b], s), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_a_mixture_sums_the_outputs_of_the_experts(gated: bool, top_k: int) -> None:
    layer = layer_of(settings("smoe", grouping=TOKEN, top_k=top_k), gated=gated).eval()
    x = tokens(2, 4)
    found = layer(x)
    for b in range(2):
        for t in range(4):
            s = layer.router(x[b, t]).weights
            assert (s > 0).sum() == top_k
            expected = torch.zeros(HIDDEN).double()
            for i in range(EXPERTS):
                up = F.linear(x[b, t], layer.up.experts[i], layer.up.expert_bias[i])
                if gated:
                    up = F.gelu(F.linear(x[b, t], layer.gate.experts[i], layer.gate.expert_bias[i])) * up
                else:
                    up = F.gelu(up)
                expected = expected + s[i] * F.linear(up, layer.down.experts[i], layer.down.expert_bias[i])
            torch.testing.assert_close(found[b, t], expected, rtol=EXACT, atol=EXACT)


def test_an_expert_that_no_token_chose_still_gets_a_gradient() -> None:
    """Of zeros: processes that share gradients must agree on which parameters have one."""
    layer = layer_of(settings("smoe", grouping=TOKEN, top_k=1))
    with torch.no_grad():
        layer.router.gate.zero_()
        layer.router.gate[:, 0] = 100 * tokens(1, 1)[0, 0]
    layer(tokens(1, 1)).sum().backward()
    for linear in (layer.up, layer.down):
        assert linear.experts.grad[0].any() and not linear.experts.grad[1:].any()


# -- dropout


@pytest.mark.parametrize("protocol", ["domain", "smoe"])
@pytest.mark.parametrize("gated", [False, True])
def test_inner_dropout_is_between_activation_and_down(protocol: str, gated: bool) -> None:
    grouping = TOKEN if protocol == "smoe" else None
    layer = layer_of(settings(protocol, grouping=grouping), gated=gated, inner_dropout=1.0).train()
    x = tokens(2, 4)
    found = layer(x)  # nothing but the biases of `down` is left
    assert found.all()
    with torch.no_grad():
        for linear in (layer.up, layer.gate):
            for parameter in linear.parameters() if linear is not None else ():
                parameter.add_(1)
    assert torch.equal(layer(x), found)
    with torch.no_grad():
        layer.down.expert_bias.zero_()
        if layer.down.base_bias is not None:
            layer.down.base_bias.zero_()
    assert not layer(x).any()
    assert layer.eval()(x).all()


@pytest.mark.parametrize("gated", [False, True])
def test_inner_dropout_scales_what_it_keeps(gated: bool) -> None:
    layer, x = layer_of(settings("domain"), gated=gated, inner_dropout=0.5).train(), tokens(1, 4)
    torch.manual_seed(2)
    found = layer(x)
    torch.manual_seed(2)
    kept = F.dropout(torch.ones(1, 4, INNER).double(), 0.5)[0]  # 0 and 2
    expected = by_hand(layer, x[0], layer.router(x[0].mean(0)).weights, kept)
    torch.testing.assert_close(found[0], expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("protocol", ["domain", "smoe"])
def test_outer_dropout_is_behind_down(protocol: str) -> None:
    grouping = TOKEN if protocol == "smoe" else None
    layer, x = layer_of(settings(protocol, grouping=grouping), outer_dropout=0.5), tokens(8, 16)
    whole = layer.eval()(x)
    dropped = layer.train()(x)
    gone = dropped == 0
    # 768 draws: the standard deviation of their mean is 0.018
    assert gone.double().mean().item() == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(dropped[~gone], 2 * whole[~gone], rtol=EXACT, atol=EXACT)


# -- what is drawn at random


@dataclass(frozen=True, eq=False)
class RecordingMultiplier(Multiplier):
    """A multiplier of one that notes the mode and the seed that a layer binds to it."""

    calls: list[tuple[bool, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.calls.append((self.training, self.seed))


class Recording:
    """A rule whose multiplier notes how it is bound."""

    statistic = bargains = needs_mean = False
    step = None

    def __init__(self, random: bool) -> None:
        self.random = random
        self.multiplier = RecordingMultiplier(lambda tau, **_: None, random=random)
        self.calls = self.multiplier.calls
        self.calls.clear()


def recorded(*, random: bool = True) -> tuple[MergedFFN, Recording]:
    from dataclasses import replace

    rule = Recording(random)
    return layer_of(replace(settings("domain"), rule=rule), gated=True), rule


def test_every_map_and_step_has_a_seed_of_its_own() -> None:
    layer, rule = recorded()
    layer.train()
    layer(tokens(1, 2))
    layer(tokens(1, 2))
    assert all(training for training, _ in rule.calls)
    assert len({seed for _, seed in rule.calls}) == 2 * 3 * 2  # steps, maps, weight and bias


def test_seeds_follow_from_the_process_s_seed() -> None:
    layer, rule = recorded()
    for _ in range(2):
        torch.manual_seed(11)
        layer.train()(tokens(1, 2))
    half = len(rule.calls) // 2
    assert rule.calls[:half] == rule.calls[half:]


def test_evaluation_and_rules_without_chance_draw_nothing() -> None:
    for layer, rule in (recorded(), recorded(random=False)):
        before = torch.get_rng_state()
        layer.train(not rule.random)(tokens(1, 2))
        assert torch.equal(torch.get_rng_state(), before)
        assert {seed for _, seed in rule.calls} == {0}


def test_recomputation_draws_the_same() -> None:
    layer, rule = recorded()
    checkpoint(layer.train(), tokens(1, 2).requires_grad_(), use_reentrant=False).sum().backward()
    half = len(rule.calls) // 2
    assert half == 6 and rule.calls[:half] == rule.calls[half:]


def test_dare_drops_other_entries_of_each_map() -> None:
    layer = layer_of(settings("dare"), gated=True).train()
    tau = torch.ones(EXPERTS, INNER, HIDDEN).double()
    up, gate = (
        linear._product(linear.stored_base, None, None)[0].multiplier for linear in (layer.up, layer.gate)
    )
    assert torch.equal(up(tau), up(tau))  # in the backward pass it is asked again
    assert not torch.equal(up(tau), gate(tau))


def test_a_seeded_pass_draws_the_same_in_every_process_and_other_entries_of_each_map() -> None:
    """The state of the process's own generator has no part in it."""
    layer, rule = recorded()
    with layer.context.open(ForwardState(seed=5)) as current:
        layer.train()(tokens(1, 2))
    torch.manual_seed(99)
    with layer.context.open(ForwardState(seed=5)):
        layer.train()(tokens(1, 2))
    half = len(rule.calls) // 2
    assert half == 6 and rule.calls[:half] == rule.calls[half:]
    assert len({seed for _, seed in rule.calls}) == 6  # maps, weight and bias
    assert (
        current.seed_of("up") != ForwardState(seed=6).seed_of("up") and ForwardState().seed_of("up") is None
    )


# -- what the layer says and refuses


def test_printing_shows_the_settings() -> None:
    layer = layer_of(settings("ties-ca", grouping=Grouping("segment", 4), top_k=2))
    assert "experts=3, top_k=2, rank=2, granularity=segment" in str(layer)


def test_parameters_follow_from_the_protocol() -> None:
    def names(protocol: str, **rest: Any) -> set[str]:
        return {n for n, _ in layer_of(settings(protocol, **rest)).named_parameters() if "down" not in n}

    up = {"up.experts", "up.expert_bias"}
    base = {"up.base", "up.base_bias"}
    curvature = {f"up.curvature.{n}" for n in ("a1", "a2", "c1", "c2", "b1", "b2")}
    assert names("smear") == up | {"router.gate"}
    assert names("ties") == up | base | {"router.gate"}
    assert names("ties-ca", noise=True) == up | base | curvature | {"router.gate", "router.noise"}
    assert names("domain", grouping=Grouping("segment")) == up | base | {"router.gate", "router.prior"}


def test_experts_start_as_the_dense_layer() -> None:
    dense = maps(gated=True)
    layer = MergedFFN(
        dense,
        nn.GELU(),
        name="layer",
        stack="encoder",
        context=RoutingContext(lambda context, module, arguments: ForwardState()),
        settings=settings("ties-ca", noise=True),
    )
    for name, (weight, bias) in dense.items():
        linear = getattr(layer, name)
        assert torch.equal(linear.base, weight) and torch.equal(linear.base_bias, bias)
        assert all(torch.equal(e, weight) for e in linear.experts)
        assert all(torch.equal(b, bias) for b in linear.expert_bias)
        linear.experts.data[0, 0, 0] += 1
    assert torch.equal(layer.up.base, maps(gated=True)["up"][0])  # nothing is shared


def test_routing_is_left_in_the_pass() -> None:
    layer, mask = layer_of(settings("domain", balance=0.5)), torch.tensor([[1, 1, 0], [0, 0, 0]])
    with layer.context.open(ForwardState(masks={"encoder": mask})) as current:
        layer(tokens(2, 3))
    left = current.layers["layer"]
    assert left.weights.shape == (2, EXPERTS) and not left.weights.requires_grad
    assert left.balance.requires_grad and left.mask is None


def test_a_mask_longer_than_the_tokens_counts_from_the_end() -> None:
    """With a key-value cache the mask covers the tokens that went before too."""
    layer = layer_of(settings("domain", grouping=TOKEN))
    mask = torch.tensor([[0, 1, 1, 0, 1]])
    with layer.context.open(ForwardState(masks={"encoder": mask}, cached=3)) as current:
        layer(tokens(1, 2))
    assert current.layers["layer"].mask.tolist() == [[0, 1]]


def test_a_mask_shorter_than_the_tokens_is_refused() -> None:
    layer = layer_of(settings("domain"))
    with (
        layer.context.open(ForwardState(masks={"encoder": torch.ones(1, 2)})),
        pytest.raises(ValueError, match="mask of the encoder has 2 positions for 3 tokens"),
    ):
        layer(tokens(1, 3))


@pytest.mark.parametrize("granularity", ["sequence", "segment"])
def test_a_cache_is_refused_where_earlier_tokens_are_needed(granularity: str) -> None:
    """Routing by sequence never works with a cache, routing by segment only with what this model remembers."""
    layer = layer_of(settings("domain", grouping=Grouping(granularity)))
    layer.stack = "decoder"
    with layer.context.open(ForwardState(cached=4)), pytest.raises(RuntimeError, match="use_cache=False"):
        layer(tokens(1, 1))
