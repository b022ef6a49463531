"""The context: masks reach the layers of their own pass, whatever else is going on."""

from __future__ import annotations

import copy
import pickle
import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from camex_ft.moe.context import ForwardState, RoutingContext
from camex_ft.moe.routing.router import Grouping
from tests.helpers.expert_layers import EXPERTS, Model, layer_of, read, settings, tokens

ONE, OTHER = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0]])
X = tokens(2, 4)
EXACT = 1e-12  # float64: the same operations, sums of gradients in another order


def model(protocol: str = "domain", **given: Any) -> Model:
    return Model(settings(protocol, **given))


def alone(mask: Tensor | None, made: Model | None = None) -> Tensor:
    with torch.no_grad():
        return (made or model())(X, mask=mask)


def test_layers_find_the_mask_of_the_call() -> None:
    assert not torch.equal(alone(ONE), alone(OTHER))
    made = model()
    made(X, ONE)
    assert made.context.active is None
    assert list(made.context.last.layers) == ["first", "second"]
    assert made.context.last.masks["encoder"] is ONE  # also where it is given by position
    assert made.context.last.layers["first"].weights.shape == (2, EXPERTS)


def test_balance_losses_are_summed() -> None:
    made = model(top_k=1)
    made(X)
    found = made.context.last
    total = found.layers["first"].balance + found.layers["second"].balance
    assert torch.equal(found.balance_loss(), total)
    assert total.requires_grad and not found.layers["first"].weights.requires_grad
    assert ForwardState().balance_loss() is None


def test_two_models_interleaved_never_meet() -> None:
    """The second model runs between the layers of the first."""
    outer, inner, seen = model(), model(), []
    outer.second.register_forward_pre_hook(lambda *_: seen.append(inner(X, mask=OTHER)))
    with torch.no_grad():
        found = outer(X, mask=ONE)
    assert torch.equal(found, alone(ONE))
    assert torch.equal(seen[0], alone(OTHER))
    assert outer.context.last.masks["encoder"] is ONE
    assert inner.context.last.masks["encoder"] is OTHER


def test_two_threads_with_one_model_never_meet() -> None:
    made = model()
    meeting = threading.Barrier(2, timeout=30)
    found: dict[int, tuple[Tensor, Any]] = {}
    made.second.register_forward_pre_hook(lambda *_: (meeting.wait(), None)[1])  # both are inside by now

    def run(key: int, mask: Tensor) -> None:
        with torch.no_grad():
            found[key] = made(X, mask=mask), made.context.last

    threads = [threading.Thread(target=run, args=a) for a in ((0, ONE), (1, OTHER))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[0][0], alone(ONE))
    assert torch.equal(found[1][0], alone(OTHER))
    assert found[0][1].masks["encoder"] is ONE and found[1][1].masks["encoder"] is OTHER
    assert made.context.last is None  # this thread has not run it


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copied_model_has_a_context_of_its_own(duplicate: Any) -> None:
    made = model()
    made(X, mask=ONE)
    twin = duplicate(made)
    assert twin.context is twin.first.context is twin.second.context
    assert twin.context is not made.context
    assert twin.context.last is None
    with torch.no_grad():
        assert torch.equal(twin(X, mask=OTHER), alone(OTHER))  # its hooks fill its own context
    assert made.context.last.masks["encoder"] is ONE


def test_a_model_is_copied_in_the_middle_of_a_pass() -> None:
    made, twins = model(), []
    made.second.register_forward_pre_hook(lambda *_: twins.append(copy.deepcopy(made)))
    made(X, mask=ONE)
    assert twins[0].context.active is None


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_error_inside_leaves_the_context_clean(error: type[BaseException]) -> None:
    made = model()

    def fail(*_: Any) -> None:
        raise error

    hook = made.second.register_forward_pre_hook(fail)
    with pytest.raises(error):
        made(X, mask=ONE)
    hook.remove()
    assert torch.equal(alone(OTHER, made), alone(OTHER))
    assert made.context.last.masks["encoder"] is OTHER
    assert made.context.active is None


def test_an_error_in_reading_leaves_the_context_clean() -> None:
    made = model()
    made.context.read = lambda context, module, arguments: (_ for _ in ()).throw(
        ValueError("mask of another shape")
    )
    with pytest.raises(ValueError, match="mask of another shape"):
        made(X, mask=ONE)
    assert made.context.active is None
    made.context.read = read
    assert torch.equal(alone(OTHER, made), alone(OTHER))


def test_a_model_inside_a_model_opens_one_pass() -> None:
    """A head calls its body, which is a model as well: the head's arguments count, for both."""

    class Head(nn.Module):
        def __init__(self, body: Model) -> None:
            super().__init__()
            self.body = body
            body.context.attach(self)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.body(x)  # passes no mask on

    made = model()
    with torch.no_grad():
        assert torch.equal(Head(made)(X, mask=ONE), alone(ONE))


def test_the_encoder_leaves_its_pooled_output() -> None:
    context = RoutingContext(read)

    class Encoder(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (2 * x,)

    encoder = Encoder()
    context.attach_encoder(encoder)
    with context.open(ForwardState(masks={"encoder": ONE})) as current:
        encoder(X)
    expected = torch.stack([2 * X[0, :2].mean(0), 2 * X[1].mean(0)])
    torch.testing.assert_close(current.encoded, expected, rtol=EXACT, atol=EXACT)
    assert context.last is None


# -- gradient checkpointing


class Checkpointed(Model):
    """Runs each layer under gradient checkpointing, as transformers' layers do."""

    def __init__(self, given: Any, reentrant: bool = False) -> None:
        super().__init__(given)
        self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)

    def forward(self, x: Tensor, mask: Tensor | None = None, **_: Any) -> Tensor:
        for layer in (self.first, self.second):
            x = self._gradient_checkpointing_func(layer.__call__, x)
        return x


def gradients(kind: type[Model], protocol: str) -> dict[str, Tensor]:
    """Two forward passes of different masks before the one backward pass that serves both, and the balance losses."""
    grouping = Grouping("token" if protocol == "smoe" else "sequence")
    made = kind(settings(protocol, grouping=grouping, noise=True, top_k=2)).train()
    x = X.clone().requires_grad_()
    torch.manual_seed(5)
    losses = []
    for mask in (ONE, OTHER):
        losses.append(made(x, mask=mask).square().sum() + made.context.last.balance_loss())
    sum(losses).backward()
    return {"x": x.grad, **{n: p.grad for n, p in made.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("protocol", ["ties-ca", "dare", "smoe"])
def test_checkpointing_changes_no_gradient(protocol: str) -> None:
    """What runs again does so under its own pass's mask, and draws the same noise and the same multiplier."""
    plain, again = gradients(Model, protocol), gradients(Checkpointed, protocol)
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=EXACT, atol=EXACT, msg=name)


def test_running_again_leaves_the_routing_of_the_last_pass() -> None:
    made = Checkpointed(settings()).train()
    x = X.clone().requires_grad_()
    first = made(x, mask=ONE)
    made(x, mask=OTHER)
    before = {name: layer.weights for name, layer in made.context.last.layers.items()}
    first.sum().backward()
    after = made.context.last.layers
    assert all(after[name].weights is weights for name, weights in before.items())


def test_reentrant_checkpointing_is_refused() -> None:
    made = Checkpointed(settings(), reentrant=True).train()
    with pytest.raises(RuntimeError, match="use_reentrant': False"):
        made(X.clone().requires_grad_(), mask=ONE)
    assert made.context.active is None


def test_checkpointing_is_wrapped_once() -> None:
    made = Checkpointed(settings()).train()
    for _ in range(3):
        made(X)
    assert made._gradient_checkpointing_func.args[0].func is checkpoint


def test_a_layer_without_a_pass_takes_every_token_as_real() -> None:
    layer = layer_of(settings()).eval()
    with layer.context.open(ForwardState()):
        inside = layer(X)
    assert torch.equal(layer(X), inside)
