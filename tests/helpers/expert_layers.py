"""Expert layers without a transformers model around them, for tests of `camex_ft.moe`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from camex_ft.moe.context import Pass, RoutingContext
from camex_ft.moe.layers.expert_linear import LayerSettings
from camex_ft.moe.layers.ffn import ExpertFFN, MergedFFN, MixtureFFN
from camex_ft.moe.routing.grouping import Grouping
from camex_ft.utils.registry import PROTOCOLS

HIDDEN, INNER, EXPERTS = 6, 8, 3


def read(context: RoutingContext, module: nn.Module, arguments: Mapping[str, Any]) -> Pass:
    """Take the mask from the call's arguments, as a backbone's family does."""
    return Pass(masks={"encoder": arguments.get("mask")}, cached=arguments.get("cached", 0))


def settings(protocol: str = "domain", *, grouping: Grouping | None = None, **given: Any) -> LayerSettings:
    """Settings of a protocol by name, without routing noise unless it is asked for."""
    rule = PROTOCOLS.get(protocol)
    defaults = {"experts": EXPERTS, "top_k": EXPERTS, "base": rule.base, "noise": False}
    rank = 2 if rule.curvature else 0
    return LayerSettings(rule=rule, grouping=grouping or Grouping(), **{**defaults, "rank": rank, **given})


def maps(*, gated: bool = False, bias: bool = True) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weights of a dense layer."""
    generator = torch.Generator().manual_seed(0)

    def one(out: int, width: int) -> tuple[Tensor, Tensor | None]:
        weight = torch.randn(out, width, generator=generator) / width**0.5
        return weight, torch.randn(out, generator=generator) if bias else None

    made = {"up": one(INNER, HIDDEN), "down": one(HIDDEN, INNER)}
    return made | ({"gate": one(INNER, HIDDEN)} if gated else {})


def layer_of(
    given: LayerSettings, *, context: RoutingContext | None = None, gated: bool = False, **rest: Any
) -> ExpertFFN:
    """An expert layer with parameters moved away from the dense layer's; float64, in training."""
    torch.manual_seed(0)
    kind = MixtureFFN if getattr(given.rule, "form", "") == "outputs" else MergedFFN
    layer = kind(
        maps(gated=gated),
        nn.GELU(),
        name="layer",
        stack="encoder",
        context=context or RoutingContext(read),
        settings=given,
        **rest,
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.double()


class Model(nn.Module):
    """A model of two expert layers, whose context is filled from its arguments."""

    def __init__(self, given: LayerSettings) -> None:
        super().__init__()
        self.context = RoutingContext(read)
        self.first = layer_of(given, context=self.context)
        self.second = layer_of(given, context=self.context)
        self.first.name, self.second.name = "first", "second"
        self.context.attach(self)

    def forward(self, x: Tensor, mask: Tensor | None = None, **_: Any) -> Tensor:
        return self.second(self.first(x))


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Hidden states; [batch, length, HIDDEN], float64."""
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(seed)).double()


def learn(made: nn.Module, curve: Callable[[Tensor], Tensor]) -> None:
    """Take a few steps of a curvature towards a random target; `curve` is the map of domain vectors [EXPERTS, 6, 8]."""
    tau, target = torch.randn(EXPERTS, 6, 8).double(), torch.randn(EXPERTS, 6, 8).double()
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (curve(tau) - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
