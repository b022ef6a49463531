"""Domain vectors that are made once: where parameters are declared unchanged, and for one optimizer step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from camex_ft.moe.context import ForwardState, RoutingContext
from camex_ft.moe.layers.ffn import ExpertFFN
from camex_ft.moe.merging import caching
from camex_ft.moe.merging.caching import Accumulation, OptimizerStep, ParameterCache
from camex_ft.utils.registry import PROTOCOLS
from tests.helpers.expert_layers import EXPERTS, layer_of, settings, tokens

CURVED = [n for n in PROTOCOLS.names() if PROTOCOLS.get(n).curvature]
MERGED = [n for n in PROTOCOLS.names() if PROTOCOLS.get(n).form == "weights"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every set of domain vectors that is made to be used again."""
    seen: list[object] = []
    cached = caching.CachedVectors
    monkeypatch.setattr(caching, "CachedVectors", lambda *parts: seen.append(parts) or cached(*parts))
    return seen


def evaluated(layer: ExpertFFN, cache: ParameterCache | None = None) -> Tensor:
    with torch.no_grad(), layer.context.open(ForwardState(parameter_cache=cache)):
        return layer(tokens(2, 5))


# -- evaluation


@pytest.mark.parametrize("protocol", CURVED)
def test_evaluation_makes_them_once(protocol: str, made: list[object]) -> None:
    layer, cache = layer_of(settings(protocol)).eval(), ParameterCache()
    first = evaluated(layer, cache)
    assert len(made) == 2  # up and down
    assert torch.equal(evaluated(layer, cache), first) and len(made) == 2
    fresh = layer_of(settings(protocol, keep_vectors=False)).eval()
    for other, given in ((fresh, cache), (layer, None)):
        # the same sums, made whole and not by slices
        torch.testing.assert_close(evaluated(other, given), first, rtol=1e-12, atol=1e-12)
    assert len(made) == 2
    cache.clear()
    assert torch.equal(evaluated(layer, cache), first) and len(made) == 4


def in_place(layer: ExpertFFN) -> None:
    with torch.no_grad():
        layer.up.experts[0].add_(1.0)


def exchange(layer: ExpertFFN) -> None:
    layer.up.experts.data = layer.up.experts.data + 1.0


def load(layer: ExpertFFN) -> None:
    layer.load_state_dict({k: v + 0.1 for k, v in layer.state_dict().items()})


def step(layer: ExpertFFN) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, foreach=True)
    layer(tokens(2, 5)).sum().backward()
    optimizer.step()


def curvature(layer: ExpertFFN) -> None:
    assert layer.up.curvature is not None
    with torch.no_grad():
        layer.up.curvature.c2.mul_(1.5)


def parameter(layer: ExpertFFN) -> None:
    layer.up.experts = torch.nn.Parameter(layer.up.experts.detach() + 1.0)


def swap(layer: ExpertFFN) -> None:
    torch.utils.swap_tensors(layer.up.experts, torch.nn.Parameter(layer.up.experts.detach() + 1.0))


def set_(layer: ExpertFFN) -> None:
    with torch.no_grad():
        layer.up.experts.set_((layer.up.experts + 1.0).untyped_storage(), 0, layer.up.experts.shape)


def narrow(layer: ExpertFFN) -> None:
    layer.to(torch.bfloat16).double()


def through_data(layer: ExpertFFN) -> None:
    for p in layer.parameters():
        p.data.mul_(0.8)


def one_element(layer: ExpertFFN) -> None:
    layer.up.experts.data[0, 0, 0] += 1.0


def factors_through_data(layer: ExpertFFN) -> None:
    layer.down.curvature.c2.data.mul_(1.5)


def by_address(layer: ExpertFFN) -> None:
    layer.up.experts.detach().numpy()[0] += 1.0


VERSIONED = [in_place, exchange, load, step, curvature, parameter, swap, set_, narrow]
UNVERSIONED = [through_data, one_element, factors_through_data, by_address]


@pytest.mark.parametrize("change", [*VERSIONED, *UNVERSIONED])
def test_no_change_is_missed_outside_of_a_scope(change: Callable[[ExpertFFN], None]) -> None:
    layer = layer_of(settings("ties-ca")).eval()
    before = evaluated(layer)
    change(layer)
    after = evaluated(layer)
    assert not torch.equal(after, before)
    assert torch.equal(evaluated(copy.deepcopy(layer)), after)


@pytest.mark.parametrize("change", VERSIONED)
def test_a_change_that_counts_versions_is_noticed_within_a_scope(
    change: Callable[[ExpertFFN], None],
) -> None:
    layer, cache = layer_of(settings("ties-ca")).eval(), ParameterCache()
    before = evaluated(layer, cache)
    change(layer)
    after = evaluated(layer, cache)
    assert not torch.equal(after, before)
    assert torch.equal(evaluated(copy.deepcopy(layer), ParameterCache()), after)


def test_other_tensors_at_the_same_address_are_not_taken_for_the_cached_ones() -> None:
    layer, cache = layer_of(settings("ties-ca")).eval(), ParameterCache()
    for scale in (1.0, 0.5, 2.0):  # freed and allocated again, with version 0 each time
        given = {n: p.detach() * scale for n, p in layer.named_parameters()}
        with torch.no_grad(), layer.context.open(ForwardState(parameter_cache=cache)):
            found = torch.func.functional_call(layer, given, (tokens(2, 5),))
        alone = copy.deepcopy(layer)
        alone.load_state_dict(given)
        assert torch.equal(found, evaluated(alone, ParameterCache()))
        del given


def test_training_in_a_scope_makes_them_afresh(made: list[object]) -> None:
    layer, cache = layer_of(settings("ties-ca")).eval(), ParameterCache()
    evaluated(layer, cache)
    with layer.context.open(ForwardState(parameter_cache=cache)):
        layer.train()(tokens(2, 5)).sum().backward()
    assert len(made) == 2


def test_blocks_within_a_block_share_a_cache_that_the_outermost_drops() -> None:
    context = layer_of(settings("ties-ca")).context
    assert context.parameter_cache is None
    with context.cached():
        outer = context.parameter_cache
        with pytest.raises(KeyboardInterrupt), context.cached():
            raise KeyboardInterrupt
        assert context.parameter_cache is outer
        assert outer is not None
        outer.get(context, (), object)
    assert context.parameter_cache is None and not outer._entries


def test_gradients_in_evaluation_mode_are_made_afresh(made: list[object]) -> None:
    layer, cache = layer_of(settings("ties-ca")).eval(), ParameterCache()
    evaluated(layer, cache)
    with layer.context.open(ForwardState(parameter_cache=cache)):
        layer(tokens(2, 5)).sum().backward()
        assert len(made) == 2 and layer.up.experts.grad is not None
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        x = tokens(2, 5).requires_grad_()
        layer(x).sum().backward()
    assert len(made) == 2 and x.grad is not None  # those of frozen experts may be cached


def test_inference_mode(made: list[object]) -> None:
    layer = layer_of(settings("ties-ca")).eval()
    expected = evaluated(layer)
    with torch.inference_mode():
        found = layer(tokens(2, 5))
    assert torch.equal(found, expected)
    with torch.inference_mode():
        inside = layer_of(settings("ties-ca")).eval()
        first = inside(tokens(2, 5))
        inside.up.experts.add_(1.0)
        assert not torch.equal(inside(tokens(2, 5)), first)


@pytest.mark.parametrize("protocol", ["smear", "domain"])
def test_what_costs_nothing_is_not_kept(protocol: str, made: list[object]) -> None:
    evaluated(layer_of(settings(protocol)).eval(), ParameterCache())
    assert not made


# -- accumulation


def micro_batches(layer: ExpertFFN, count: int, *, sharing: bool, again: bool = False) -> dict[str, Tensor]:
    """Gradients of `count` micro-batches; `again`: with gradient checkpointing."""
    torch.manual_seed(7)
    accumulation = Accumulation()
    for i in range(count):
        x = tokens(3, 4) * (i + 1)
        with accumulation.micro_batch(last=i == count - 1):
            current = ForwardState(micro_batch=accumulation.now if sharing else None)

            def run(x: Tensor, current: ForwardState = current) -> Tensor:
                with layer.context.open(current):
                    return layer(x)

            y = checkpoint(run, x, use_reentrant=False) if again else run(x)
            y.square().sum().backward()
    return {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("top_k", [EXPERTS, 2])
@pytest.mark.parametrize("protocol", MERGED)
def test_sharing_equals_making_them_every_time(protocol: str, top_k: int, again: bool) -> None:
    rule = PROTOCOLS.get(protocol)
    still = settings(protocol, top_k=top_k)
    if rule.random:  # with a mask for each micro-batch the gradients differ by design
        still = replace(still, rule=rule.bind({"drop": 0.0}))
    alone = micro_batches(layer_of(still).train(), 3, sharing=False)
    shared = micro_batches(layer_of(still).train(), 3, sharing=True, again=again)
    assert alone.keys() == shared.keys()
    for name, gradient in alone.items():
        # float64; the pull-back of a sum against a sum of pull-backs
        torch.testing.assert_close(shared[name], gradient, rtol=1e-10, atol=1e-10)


def test_they_are_made_once_a_step(made: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    release = OptimizerStep.release
    layer, shared = layer_of(settings("ties-ca")).train(), []
    monkeypatch.setattr(
        OptimizerStep, "release", lambda self: shared.extend(self.cached.values()) or release(self)
    )
    micro_batches(layer, 3, sharing=True)
    assert len(made) == 2
    micro_batches(layer, 2, sharing=True)
    assert len(made) == 4
    assert len(shared) == 4 and not any(one.vectors.numel() for _, one in shared)  # freed


def test_dare_draws_one_mask_a_step(made: list[object]) -> None:
    layer = layer_of(settings("dare-ca")).train()
    accumulation, results = Accumulation(), []
    for last in (False, True):
        with (
            accumulation.micro_batch(last=last),
            layer.context.open(ForwardState(micro_batch=accumulation.now)),
        ):
            y = layer(tokens(2, 3))
            y.sum().backward()
            results.append(y.detach())
    assert torch.equal(*results)
    with accumulation.micro_batch(last=True), layer.context.open(ForwardState(micro_batch=accumulation.now)):
        y = layer(tokens(2, 3))
        y.sum().backward()
    assert not torch.equal(y.detach(), results[0])


def test_a_parameter_must_stay_within_a_step() -> None:
    layer = layer_of(settings("ties-ca")).train()
    accumulation = Accumulation()
    with accumulation.micro_batch(last=False), layer.context.open(ForwardState(micro_batch=accumulation.now)):
        layer(tokens(2, 3)).sum().backward()
    in_place(layer)
    with (
        pytest.raises(RuntimeError, match="changed between the micro-batches"),
        accumulation.micro_batch(last=True),
        layer.context.open(ForwardState(micro_batch=accumulation.now)),
    ):
        layer(tokens(2, 3))
    micro_batches(layer, 2, sharing=True)  # a step that failed is over


def test_a_layer_must_take_part_in_the_last() -> None:
    layer = layer_of(settings("ties-ca")).train()
    accumulation = Accumulation()
    with accumulation.micro_batch(last=False), layer.context.open(ForwardState(micro_batch=accumulation.now)):
        layer(tokens(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="took no part"), accumulation.micro_batch(last=True):
        pass


def test_the_context_hands_the_micro_batch_to_the_pass() -> None:
    context = RoutingContext(lambda context, module, arguments: ForwardState())
    layer = torch.nn.Linear(2, 2)
    seen = []
    layer.register_forward_hook(
        lambda *_: seen.append(context.active.micro_batch if context.active else None)
    )
    context.attach(layer)
    layer(torch.ones(1, 2))
    with context.micro_batch(last=False):
        layer(torch.ones(1, 2))
    with context.micro_batch(last=True):
        layer(torch.ones(1, 2))
    assert seen[0] is None and seen[1].step is seen[2].step
    assert [m.last for m in seen[1:]] == [False, True]
