"""Cosine routing, expert choice, temperature, normalisation before top-k and the z-loss, against plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from torch import Tensor

from camex_ft.moe.context import ForwardState
from camex_ft.moe.routing.losses import sum_losses
from camex_ft.moe.routing.router import (
    COLDEST,
    START,
    Grouping,
    Router,
    RouterSettings,
    Routing,
    choose,
    topk_softmax,
)
from tests.helpers.expert_layers import EXPERTS, Model, layer_of, settings, tokens

EXACT = 1e-12  # float64, sums of at most a dozen terms
TOKEN = Grouping("token")
few = limits(max_examples=60, deadline=None)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def router(
    *, experts: int = 4, top_k: int = 2, prior: bool = False, noise: bool = False, **given: Any
) -> Router:
    torch.manual_seed(0)
    made = Router(
        in_features=6,
        experts=experts,
        top_k=top_k,
        noise=noise,
        prior=prior,
        settings=RouterSettings(**given),
    ).double()
    for parameter in (made.noise, made.prior):
        if parameter is not None:
            torch.nn.init.normal_(parameter)
    return made.eval()


def by_loop(logits: Tensor, k: int, temperature: float, normalise: str) -> Tensor:
    """One row of routing weights, term by term."""
    terms = [math.exp((float(z) - float(logits.max())) / temperature) for z in logits]
    chosen = sorted(range(len(terms)), key=lambda i: -float(logits[i]))[:k]
    total = sum(terms[i] for i in (chosen if normalise == "after" else range(len(terms))))
    return torch.tensor(
        [terms[i] / total if i in chosen else 0.0 for i in range(len(terms))], dtype=torch.float64
    )


# -- temperature and normalisation


@few
@given(st.integers(0, 99), st.integers(1, 5), st.floats(0.05, 20), st.sampled_from(["after", "before"]))
def test_weights_are_those_of_the_formula(seed: int, k: int, temperature: float, normalise: Any) -> None:
    logits = 3 * drawn(4, 5, seed=seed)
    s = topk_softmax(logits, top_k=k, temperature=temperature, normalise=normalise)
    expected = torch.stack([by_loop(row, k, temperature, normalise) for row in logits])
    torch.testing.assert_close(s, expected, rtol=EXACT, atol=EXACT)
    assert ((s > 0).sum(-1) <= k).all()
    total = s.sum(-1)
    assert (total <= 1 + EXACT).all()
    if normalise == "after" or k == 5:
        torch.testing.assert_close(total, torch.ones_like(total), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_k", [2, 4])
def test_temperature_goes_from_the_largest_alone_to_all_alike(dtype: torch.dtype, top_k: int) -> None:
    logits = drawn(5, 4).to(dtype).requires_grad_()
    for cold in (1e-9, 1e-300):  # the second is 0 in float32
        s = topk_softmax(logits, top_k=top_k, temperature=cold)
        assert torch.equal(s, torch.nn.functional.one_hot(logits.argmax(-1), 4).to(dtype))
        assert torch.autograd.grad(s[:, 0].sum(), logits)[0].isfinite().all()
    hot = topk_softmax(logits, top_k=top_k, temperature=1e300)
    assert torch.equal(hot, (hot > 0) / torch.tensor(float(top_k), dtype=dtype))


@pytest.mark.parametrize("normalise", ["after", "before"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gradients_are_those_of_the_plain_formula(top_k: int, normalise: Any) -> None:
    logits, weight = drawn(3, 4).requires_grad_(), drawn(3, 4, seed=1)
    fast = topk_softmax(logits, top_k=top_k, temperature=0.7, normalise=normalise)
    chosen = torch.zeros(3, 4).double().scatter(1, logits.topk(top_k).indices, 1.0)
    terms = (logits / 0.7).exp()
    over = terms * chosen if normalise == "after" else terms
    plain = terms * chosen / over.sum(-1, keepdim=True)
    found, expected = (torch.autograd.grad((s * weight).sum(), logits)[0] for s in (fast, plain))
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
    # one expert, normalised after, has the weight 1 whatever the router says: nothing to learn from
    assert bool(found.abs().max() > 1e-3) is (top_k > 1 or normalise == "before")


# -- cosine


def test_cosine_logits_are_cosines_over_the_temperature() -> None:
    layer, x = router(kind="cosine", top_k=4), drawn(3, 6)
    assert layer.log_temperature.item() == pytest.approx(math.log(START))
    found, t = layer(x).logits, layer.log_temperature.exp()[0]
    for row, logits in zip(x, found, strict=True):
        for i in range(4):
            w = layer.gate[:, i]
            cosine = sum(row * w) / math.sqrt(sum(row**2)) / sum(w**2) ** 0.5
            torch.testing.assert_close(logits[i], cosine / t, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(layer(7 * x).logits, found, rtol=EXACT, atol=EXACT)


def test_cosine_gradients_are_those_of_finite_differences() -> None:
    layer = router(kind="cosine", top_k=4)

    def weights(x: Tensor, gate: Tensor, log_temperature: Tensor) -> Tensor:
        given = {"gate": gate, "log_temperature": log_temperature}
        return torch.func.functional_call(layer, given, (x,)).weights

    inputs = (drawn(3, 6).requires_grad_(), layer.gate, layer.log_temperature)
    assert torch.autograd.gradcheck(weights, inputs)


def test_inputs_and_experts_of_length_zero_are_routed_with_finite_gradients() -> None:
    layer, x = router(kind="cosine", top_k=4), drawn(3, 6)
    x[1] = 0
    x[2] = 1e-200  # its square rounds to 0
    with torch.no_grad():
        layer.gate[:, 2] = 0
    x.requires_grad_()
    found = layer(x)
    assert torch.equal(found.logits[1], torch.zeros(4).double()) and not found.logits[:, 2].any()
    grads = torch.autograd.grad((found.weights * drawn(3, 4)).sum(), [x, *layer.parameters()])
    assert all(g.isfinite().all() and float(g.abs().max()) < 100 for g in grads)


def test_the_learned_temperature_cannot_collapse() -> None:
    layer, x = router(kind="cosine", top_k=4), drawn(8, 6)
    with torch.no_grad():
        layer.log_temperature.fill_(-1e4)
    logits = layer(x).logits.detach()
    assert logits.isfinite().all() and float(logits.abs().max()) <= (1 + EXACT) / COLDEST


@pytest.mark.parametrize("kind", ["linear", "cosine", "expert-choice"])
def test_experts_follow_the_columns_of_the_gate(kind: Any) -> None:
    layer, x, turned = router(kind=kind), drawn(5, 6), torch.tensor([2, 0, 3, 1])
    before = layer(x).weights
    with torch.no_grad():
        layer.gate.copy_(layer.gate[:, turned])
    torch.testing.assert_close(layer(x).weights, before[:, turned], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kind", ["linear", "cosine", "expert-choice"])
def test_noise_is_added_to_the_logits_in_training(kind: Any) -> None:
    layer, x = router(kind=kind, noise=True, temperature=0.5, top_k=1), drawn(5, 6)
    quiet = layer(x)
    noisy = layer.train()(x)
    assert torch.equal(noisy.logits, quiet.logits) and quiet.noisy is None
    assert (noisy.noisy != noisy.logits).all()
    again = choose if kind == "expert-choice" else topk_softmax
    rest = (None,) if kind == "expert-choice" else ()
    assert torch.equal(noisy.weights, again(noisy.noisy, *rest, top_k=1, temperature=0.5))


def test_the_prior_holds_logits_whatever_the_kind() -> None:
    layer = router(kind="cosine", prior=True, temperature=0.5, normalise="before")
    expected = topk_softmax(layer.prior, top_k=2, temperature=0.5, normalise="before")
    assert torch.equal(layer.route_prior(3).weights, expected.expand(3, -1))


# -- expert choice


def chosen_by_loop(logits: Tensor, real: list[int], k: int, normalise: str = "after") -> dict[int, Tensor]:
    """Weights of the real tokens of one sequence [L, N]."""
    experts = logits.shape[1]
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    seats = [t for t, m in enumerate(real) if m]
    took: dict[int, set[int]] = {t: set() for t in seats}
    for i in range(experts):
        best = sorted(seats, key=lambda t: -float(p[t, i]))
        for t in best[: math.ceil(k * len(seats) / experts)]:
            took[t].add(i)
    made = {}
    for t, by in took.items():
        keep = by or {int(p[t].argmax())}
        row = torch.tensor(
            [float(p[t, i]) if i in keep else 0.0 for i in range(experts)], dtype=torch.float64
        )
        made[t] = row if normalise == "before" else row / sum(float(p[t, i]) for i in keep)
    return made


@few
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=7, max_size=7), min_size=1, max_size=3),
    st.integers(1, 3),
    st.sampled_from(["after", "before"]),
    st.integers(0, 99),
)
def test_each_expert_takes_its_best_tokens_of_a_sequence(
    mask: list[list[int]], k: int, normalise: Any, seed: int
) -> None:
    logits = drawn(len(mask), 7, 3, seed=seed)
    found = choose(logits, torch.tensor(mask), top_k=k, normalise=normalise)
    for b, real in enumerate(mask):
        for t, expected in chosen_by_loop(logits[b], real, k, normalise).items():
            torch.testing.assert_close(found[b, t], expected, rtol=EXACT, atol=EXACT)
    if normalise == "after":  # no token is dropped, padding included
        assert ((found.sum(-1) - 1).abs() < EXACT).all()


@few
@given(st.integers(1, 6), st.integers(0, 4), st.integers(0, 4), st.integers(1, 3), st.booleans())
def test_padding_and_neighbours_change_no_choice(
    length: int, left: int, right: int, k: int, equal: bool
) -> None:
    own = drawn(length, 3) * (not equal)  # where all tokens are equal, the first ones are taken
    alone = choose(own, None, top_k=k)
    width = left + length + right
    batch = 9 * drawn(3, width, 3, seed=1)
    batch[1, left : left + length] = own
    mask = torch.ones(3, width)
    mask[1, :left] = mask[1, left + length :] = 0
    assert torch.equal(choose(batch, mask, top_k=k)[1, left : left + length], alone)


def test_expert_choice_holds_where_probabilities_round_to_zero() -> None:
    logits = torch.tensor([[0.0, 900.0], [0.0, 950.0], [0.0, 800.0]], requires_grad=True)
    s = choose(
        logits, None, top_k=1
    )  # two places each: expert 0 takes tokens 2 and 0, of whose p_t0 float32 knows 0
    assert torch.equal(s.detach(), torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]))
    assert torch.autograd.grad(s[:, 0].sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_expert_choice_has_a_weight_for_every_token_however_cold(dtype: torch.dtype) -> None:
    logits = drawn(2, 7, 3).to(dtype)
    s = choose(logits, torch.tensor([[1] * 7, [1] * 3 + [0] * 4]), top_k=1, temperature=1e-300)
    assert torch.equal(s.sum(-1), torch.ones(2, 7, dtype=dtype))


def test_expert_choice_of_every_expert_is_the_softmax() -> None:
    logits = drawn(2, 5, 3)
    torch.testing.assert_close(choose(logits, None, top_k=3), logits.softmax(-1), rtol=EXACT, atol=EXACT)


def test_gradients_of_expert_choice_are_those_of_the_plain_formula() -> None:
    logits, weight = drawn(2, 5, 3).requires_grad_(), drawn(2, 5, 3, seed=1)
    fast = choose(logits, None, top_k=2)
    taken = (fast.detach() > 0).double()
    plain = taken * logits.exp() / (taken * logits.exp()).sum(-1, keepdim=True)
    found, expected = (torch.autograd.grad((s * weight).sum(), logits)[0] for s in (fast, plain))
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


def test_a_mixture_by_expert_choice() -> None:
    chooser = RouterSettings(kind="expert-choice")
    layer = layer_of(settings("smoe", grouping=TOKEN, top_k=1, router=chooser, balance=0.5)).eval()
    x, mask = tokens(2, 7), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with layer.context.open(ForwardState(masks={"encoder": mask})) as current:
        found = layer(x)
    assert current.layers["layer"].balance == 0  # balanced as it is made
    torch.testing.assert_close(layer(x[1:, :4]), found[1:, :4], rtol=EXACT, atol=EXACT)
    s = layer.router(x[0]).weights
    assert ((s > 0).sum(0) >= 3).all()  # ceil(1 * 7 / 3) places each, and those that nobody took


def test_expert_choice_refuses_a_cache() -> None:
    layer = layer_of(settings("smoe", grouping=TOKEN, router=RouterSettings(kind="expert-choice")))
    layer.stack = "decoder"
    with (
        layer.context.open(ForwardState(cached=4)),
        pytest.raises(RuntimeError, match=r"expert choice .* use_cache=False"),
    ):
        layer(tokens(1, 1))


# -- z-loss


def z_loss(routing: Routing, coef: float, mask: Tensor | None = None) -> Tensor:
    return sum_losses(routing, top_k=1, coef=0.0, z_coef=coef, mask=mask).loss()


def test_z_loss_is_the_mean_square_of_logsumexp() -> None:
    logits = drawn(2, 3, 4)
    expected = sum(math.log(sum(math.exp(z) for z in row)) ** 2 for row in logits.view(6, 4).tolist()) / 6
    routing = Routing(logits.softmax(-1), logits)
    assert float(z_loss(routing, 0.5)) == pytest.approx(0.5 * expected, rel=EXACT)


def test_padding_has_no_part_in_the_z_loss() -> None:
    logits, mask = drawn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    logits[mask == 0] = math.nan
    logits.requires_grad_()
    found = z_loss(Routing(logits.softmax(-1), logits), 2.0, mask)
    plain = 2.0 * logits[mask == 1].logsumexp(-1).square().mean()
    torch.testing.assert_close(found, plain, rtol=EXACT, atol=EXACT)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (found, plain)]
    torch.testing.assert_close(*grads, rtol=EXACT, atol=EXACT)
    assert z_loss(Routing(logits, logits), 1.0, torch.zeros(2, 3)) == 0


@pytest.mark.parametrize("granularity", ["sequence", "segment", "token"])
def test_a_layer_adds_its_z_loss_to_its_balance_loss(granularity: Any) -> None:
    x, mask = tokens(2, 5), torch.tensor([[1] * 5, [1] * 2 + [0] * 3])

    def added(**given: Any) -> Tensor:
        layer = layer_of(settings(grouping=Grouping(granularity, 2), **given))
        with layer.context.open(ForwardState(masks={"encoder": mask})) as current:
            layer(x)
        return current.layers["layer"].balance

    both = added(balance=0.3, router=RouterSettings(z_loss=0.2))
    alone = added(balance=0.0, router=RouterSettings(z_loss=0.2))
    assert alone > 0
    torch.testing.assert_close(both - added(balance=0.3), alone, rtol=EXACT, atol=EXACT)


# -- in layers


@pytest.mark.parametrize("granularity", ["sequence", "segment", "token"])
def test_a_merged_layer_takes_weights_that_sum_to_less_than_one(granularity: Any) -> None:
    """`domain` stays at its base for the share that is missing; the sparse form must not count on a sum of 1."""
    given = {"top_k": 1, "router": RouterSettings(normalise="before", temperature=2.0)}
    layer = layer_of(settings("domain", grouping=Grouping(granularity, 2), **given)).eval()
    x = tokens(1, 4)
    before = layer(x)
    with layer.context.open(ForwardState()) as current:
        layer(x)
    s = current.layers["layer"].weights
    assert ((s > 0).sum(-1) == 1).all() and (s.sum(-1) < 1).all()
    with torch.no_grad():
        for linear in (layer.up, layer.down):
            linear.experts.copy_(linear.base + 2 * (linear.experts - linear.base))
            linear.expert_bias.copy_(linear.base_bias + 2 * (linear.expert_bias - linear.base_bias))
            linear.alpha = 0.5
    torch.testing.assert_close(layer(x), before, rtol=1e-10, atol=1e-10)  # half the step of twice the vectors


def test_top_one_normalised_before_teaches_the_router() -> None:
    def learned(normalise: Any) -> float:
        given = settings("smear", top_k=1, balance=0.0, router=RouterSettings(normalise=normalise))
        layer = layer_of(given)
        layer(tokens(3, 4)).square().sum().backward()
        return float(layer.router.gate.grad.abs().max())

    assert learned("after") == 0 < learned("before")


def test_a_model_s_routers_are_its_own() -> None:
    made = Model(settings(router=RouterSettings(kind="cosine"), top_k=EXPERTS - 1))
    names = {n for n, _ in made.named_parameters() if "temperature" in n}
    assert names == {"first.router.log_temperature", "second.router.log_temperature"}
    made(tokens(2, 3)).square().sum().backward()
    assert all(float(layer.router.log_temperature.grad) != 0 for layer in (made.first, made.second))
