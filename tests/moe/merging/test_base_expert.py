"""Dynamic merging: the base expert carried along a chain of layers, against the formulas written out plainly."""

from __future__ import annotations

import cmath
import copy
import math
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from camex_ft.moe.context import ForwardState, RoutingContext
from camex_ft.moe.layers.ffn import MergedFFN
from camex_ft.moe.layers.propagation import propagation_paths
from camex_ft.moe.merging.base_expert import BaseExperts, LayerVectors, PropagatedBase, descend, gram_matrix
from camex_ft.moe.merging.functional import merged_linear_and_mean
from camex_ft.moe.merging.nash import nash_weights
from camex_ft.moe.merging.reference import transform_reference
from camex_ft.utils.registry import PROTOCOLS
from tests.helpers.expert_layers import (
    EXPERTS,
    layer_of,
    merged_linear,
    merged_linear_reference,
    product,
    read,
    settings,
    tokens,
)

# float64: sums of at most a few hundred products of numbers of about 1, in another order, over three layers
TOLERANCE = 1e-11
DYNAMIC = [n for n in PROTOCOLS.names() if PROTOCOLS.get(n).form == "dynamic"]
OPTIONS: dict[str, list[dict[str, float]]] = {
    "ep-camex": [{"gamma": 0.7}],
    "namex": [{"gamma": 0.3}, {"gamma": 0.3, "momentum": 0.9, "angle": 0.5}],
    "namex-full": [
        {"gamma": 0.3},
        {"gamma": 0.3, "momentum": 0.9},
        {"gamma": 0.3, "momentum": 0.9, "angle": 0.5},
    ],
}
CASES = [(name, options) for name in DYNAMIC for options in OPTIONS[name]]


class Stack(nn.Module):
    """Layers with experts that form one chain, each after a residual, as in a transformer."""

    def __init__(self, protocol: str, options: dict[str, float], *, layers: int = 3, **given: Any) -> None:
        super().__init__()
        self.context = RoutingContext(read)
        chosen = settings(protocol, **given)
        object.__setattr__(chosen, "rule", chosen.rule.bind(options))
        self.layers = nn.ModuleList()
        for i in range(layers):
            previous = self.layers[-1] if i else None
            layer = layer_of(chosen, context=self.context, gated=True, previous=previous)
            layer.name = f"layer{i}"
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.mul_(1 + 0.1 * i).add_(0.05 * i)  # layers differ
            self.layers.append(layer)
        self.context.attach(self)
        self.checkpointed = False
        self._gradient_checkpointing_func: Any = partial(
            checkpoint, use_reentrant=False
        )  # as transformers has it

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = self._gradient_checkpointing_func(layer, x) if self.checkpointed else layer(x)
            x = x + y
        return x


def named(layer: MergedFFN) -> list[tuple[str, Tensor, str]]:
    """Return (map, its experts, "weight" or "bias") of every tensor of a layer."""
    found = [(n, m.experts, "weight") for n, m in layer.linears.items()]
    return found + [(n, m.expert_bias, "bias") for n, m in layer.linears.items() if m.expert_bias is not None]


def curved(layer: MergedFFN, name: str, kind: str, base: Tensor) -> Tensor:
    """Return M_i tau_i of one tensor, written out plainly."""
    linear = layer.linears[name]
    if kind == "weight":
        return transform_reference(linear.product(BaseExperts(PropagatedBase(base), None)))
    tau = linear.expert_bias - base
    return tau if linear.curvature is None else linear.curvature.transform_bias(tau)


def bases_plain(
    stack: Stack, protocol: str, options: dict[str, float]
) -> list[dict[tuple[str, str], Tensor]]:
    """Return E_m of every layer and tensor by the protocols' formulas."""
    first = stack.layers[0]
    base = {
        (n, k): first.linears[n].base if k == "weight" else first.linears[n].base_bias
        for n, _, k in named(first)
    }
    gamma, beta = options["gamma"], cmath.rect(options.get("momentum", 0.0), options.get("angle", 0.0))
    momentum: dict[tuple[str, str], Any] = dict.fromkeys(base, 0)
    shares, found = None, [base]
    for layer in stack.layers[:-1]:
        tau = {(n, k): e - base[n, k] for n, e, k in named(layer)}
        whole = torch.cat([t.flatten(1) for t in tau.values()], dim=1).detach()
        a = nash_weights(whole @ whole.T)
        if protocol == "namex":
            shares = a * whole.norm(dim=1) if shares is None else shares
            a = shares / whole.norm(dim=1)
        new = {}
        for (n, k), t in tau.items():
            if protocol == "ep-camex":
                delta = curved(layer, n, k, base[n, k]).sum(0) / EXPERTS
            else:
                delta = torch.einsum("n,n...->...", a, t)
            momentum[n, k] = beta * momentum[n, k] + delta
            moved = momentum[n, k]
            new[n, k] = base[n, k] + gamma * (moved.real if moved.is_complex() else moved)
        base = new
        found.append(base)
    return found


def plain(stack: Stack, protocol: str, options: dict[str, float], x: Tensor) -> Tensor:
    """Return the stack's output with merged experts made by the plain formula from the plain bases."""
    for layer, base in zip(stack.layers, bases_plain(stack, protocol, options), strict=True):
        s = layer.router(x.mean(1)).weights

        def mapped(name: str, x: Tensor, layer=layer, base=base, s=s) -> Tensor:
            linear = layer.linears[name]
            y = merged_linear_reference(
                x,
                s,
                linear.experts,
                base[name, "weight"],
                alpha=linear.alpha,
                factors=linear.curvature and linear.curvature.factors,
            )
            bias = base[name, "bias"]
            return y + (bias + linear.alpha * s @ curved(layer, name, "bias", bias)).unsqueeze(1)

        x = x + mapped("down", layer.activation(mapped("gate", x)) * mapped("up", x))
    return x


def close(ours: Tensor, theirs: Tensor, name: str = "") -> None:
    scale = max(1.0, float(theirs.detach().abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * scale, msg=lambda m: f"{name}: {m}")


def gradients(stack: Stack, y: Tensor) -> dict[str, Tensor]:
    stack.zero_grad()
    y.square().sum().backward()
    return {n: p.grad.clone() for n, p in stack.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("protocol", "options"), CASES)
@pytest.mark.parametrize("given", [{}, {"rank": 0}, {"alpha": 0.6}, {"top_k": 2}], ids=str)
def test_values_and_gradients_are_those_of_the_formulas(
    protocol: str, options: dict[str, float], given: dict[str, Any]
) -> None:
    stack, x = Stack(protocol, options, **given), tokens(2, 5)
    ours, theirs = stack(x), plain(stack, protocol, options, x)
    close(ours, theirs)
    mine, oracle = gradients(stack, ours), gradients(stack, theirs)
    assert set(mine) == set(oracle)
    largest = max(float(value.abs().max()) for value in oracle.values())
    for (
        name,
        value,
    ) in oracle.items():  # where the base cancels, what is left of large numbers is their rounding
        torch.testing.assert_close(
            mine[name], value, rtol=0, atol=TOLERANCE * largest, msg=lambda m, n=name: n + m
        )
    if given != {"rank": 0}:  # without curvature and with alpha 1 the base cancels
        assert float(mine["layers.0.up.base"].abs().max()) > 1e-6 * largest


@pytest.mark.parametrize(("protocol", "options"), CASES)
def test_without_curvature_and_at_alpha_one_the_base_makes_no_difference(
    protocol: str, options: dict[str, float]
) -> None:
    """Why there is no Euclidean dynamic merging: it would be `smear`."""
    stack, smear = Stack(protocol, options, rank=0), Stack("smear", {})
    smear.load_state_dict(stack.state_dict(), strict=False)
    close(stack(tokens(2, 5)), smear(tokens(2, 5)))


@pytest.mark.parametrize(("protocol", "options"), CASES)
def test_a_scope_caches_bases_and_notices_changes(protocol: str, options: dict[str, float]) -> None:
    stack, x = Stack(protocol, options).eval(), tokens(2, 5)
    with torch.no_grad(), stack.context.cached():
        first, cache = stack(x), stack.context.parameter_cache
        close(first, plain(stack, protocol, options, x))
        kept = cache._entries[stack.layers[2].propagation][1]
        assert torch.equal(stack(x), first) and cache._entries[stack.layers[2].propagation][1] is kept
        stack.layers[0].down.experts.mul_(1.1)  # far up the chain
        close(stack(x), plain(stack, protocol, options, x))
        assert cache._entries[stack.layers[2].propagation][1] is not kept
        stack.layers[0].down.expert_bias.mul_(1.5)  # a bias alone
        close(stack(x), plain(stack, protocol, options, x))
        alone = stack.layers[2](x)  # outside a pass
        stack.layers[0].up.experts.data.mul_(1.1)
    with torch.no_grad():
        close(stack(x), plain(stack, protocol, options, x))
        stack.layers[0].up.experts.data.div_(1.1)
    fresh = copy.deepcopy(stack).train().eval()
    assert fresh.layers[1].propagation.previous.layer is fresh.layers[0]
    close(fresh.layers[2](x), alone)  # with gradients, and from the parameters of the layers before it


@pytest.mark.parametrize(("protocol", "options"), CASES)
def test_nothing_is_kept_where_it_is_not_wanted(protocol: str, options: dict[str, float]) -> None:
    stack, x = Stack(protocol, options, keep_vectors=False).eval(), tokens(2, 5)
    with torch.no_grad(), stack.context.cached():
        close(stack(x), plain(stack, protocol, options, x))
        assert not stack.context.parameter_cache._entries


@pytest.mark.parametrize(("protocol", "options"), CASES)
def test_gradient_checkpointing_changes_nothing(protocol: str, options: dict[str, float]) -> None:
    found = []
    for checkpointed in (False, True):
        stack = Stack(protocol, options)
        stack.checkpointed = checkpointed
        for _ in range(2):  # the second step starts its bargain from the first one's
            found.append(gradients(stack, stack(tokens(2, 5))))
    for name in found[0]:
        assert torch.equal(found[0][name], found[2][name]) and torch.equal(found[1][name], found[3][name]), (
            name
        )


@pytest.mark.parametrize(("protocol", "options"), CASES)
def test_micro_batches_share_domain_vectors(protocol: str, options: dict[str, float]) -> None:
    """Gradients of two micro-batches of one step, whose T are made once, are those of the two apart."""
    stack, parts = Stack(protocol, options), (tokens(2, 5), tokens(2, 5, seed=1))
    stack.zero_grad()
    for x in parts:
        stack(x).square().sum().backward()
    apart = {n: p.grad.clone() for n, p in stack.named_parameters()}
    stack.zero_grad()
    for i, x in enumerate(parts):
        with stack.context.micro_batch(last=i == 1):
            stack(x).square().sum().backward()
    for name, parameter in stack.named_parameters():
        close(parameter.grad, apart[name], name)


@pytest.mark.parametrize(("protocol", "options"), CASES)
def test_what_is_carried_goes_to_the_device_of_the_next_layer(
    protocol: str, options: dict[str, float]
) -> None:
    stack = Stack(protocol, options)
    stack.layers[1].to("meta")
    first, current = stack.layers[0].propagation, ForwardState()
    for bases in first.following_bases(first.bases(current), current).values():
        for carried in (bases.weight, bases.bias):
            assert {part.device.type for part in carried if part is not None} == {"meta"}


def test_a_chain_survives_copies_and_files() -> None:
    stack = Stack("ep-camex", {})
    for made in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert propagation_paths(list(made.layers)) == [["layer0", "layer1", "layer2"]]
        assert made.layers[1].propagation.layer is made.layers[1]
        close(made(tokens(2, 5)), stack(tokens(2, 5)))


# -- parts


@pytest.mark.parametrize("form", ["merge", "mix"])
@pytest.mark.parametrize("base", [True, False])
def test_the_mean_is_that_of_the_domain_vectors(form: Any, base: bool) -> None:
    layer = Stack("ep-camex", {}).layers[0].up
    x, s = tokens(2, 5).requires_grad_(), torch.full((2, EXPERTS), 1 / EXPERTS, dtype=torch.float64)
    given = {"factors": layer.curvature.factors if base else None, "form": form}
    e_m = layer.base if base else None
    y, mean = merged_linear_and_mean(x, s, product(layer.experts, e_m, **given))
    close(y, merged_linear(x, s, layer.experts, e_m, **given))
    expected = transform_reference(product(layer.experts, e_m, **given)).mean(0)
    close(mean, expected)
    (mine,) = torch.autograd.grad(mean.square().sum(), layer.experts)  # y is not used
    (oracle,) = torch.autograd.grad(expected.square().sum(), layer.experts)
    close(mine, oracle)


@pytest.mark.parametrize("shape", [(4, 7, 5), (4, 7)])
def test_weighted_sums_are_not_rounded_by_autocast(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    experts, base = (torch.randn(s, generator=generator).requires_grad_() for s in (shape, shape[1:]))
    a, upstream = torch.rand(shape[0], generator=generator), torch.randn(shape[1:], generator=generator)
    made = LayerVectors(experts, base, lambda: a, lambda: a).sum(a)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = torch.autograd.grad(made, (experts, base), upstream)
    expected = torch.einsum("n,n...->...", a, experts - base)
    # float32, sums of four products
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)
    for one, other in zip(mine, torch.autograd.grad(expected, (experts, base), upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 7, 5), (4, 7)])
def test_gram_matrix(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.randn(shape, generator=generator, dtype=torch.float64)
    base = torch.randn(shape[1:], generator=generator, dtype=torch.float64)
    tau = (experts - base).flatten(1)
    close(gram_matrix(experts, base), tau @ tau.T)
    assert gram_matrix(experts.bfloat16(), base.bfloat16()).dtype == torch.float64


@pytest.mark.parametrize("angle", [0.0, math.pi / 6, 2.0])
def test_momentum_is_a_sum_of_turned_steps(angle: float) -> None:
    """After steps d_0 .. d_n: E_m + gamma * sum over t and j <= t of momentum^(t-j) cos((t-j) angle) d_j."""
    steps = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    carried = mirrored = PropagatedBase(torch.zeros(3, dtype=torch.float64))
    for delta in steps:
        carried = descend(carried, delta, gamma=0.5, momentum=0.9, angle=angle)
        mirrored = descend(mirrored, delta, gamma=0.5, momentum=0.9, angle=-angle)
    expected = sum(
        0.5 * 0.9 ** (t - j) * math.cos((t - j) * angle) * steps[j] for t in range(5) for j in range(t + 1)
    )
    close(carried.base, expected)
    assert torch.equal(carried.base, mirrored.base)  # the sign of the angle makes no difference


def test_steps_before_training() -> None:
    """All domain vectors are zero: nothing moves, and no gradient is a NaN."""
    for protocol, options in CASES:
        stack = Stack(protocol, options)
        with torch.no_grad():
            for layer in stack.layers:
                for linear in layer.linears.values():
                    linear.experts.copy_(stack.layers[0].linears["up"].base.mean())
                    linear.expert_bias.zero_()
                    if linear.base is not None:
                        linear.base.copy_(linear.experts[0])
                        linear.base_bias.zero_()
        found = gradients(stack, stack(tokens(2, 5)))
        assert all(bool(g.isfinite().all()) for g in found.values())
