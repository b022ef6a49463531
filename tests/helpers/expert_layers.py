"""Expert layers without a transformers model around them, for tests of `camex_ft.moe`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from camex_ft.moe.config import LayerSettings
from camex_ft.moe.context import ForwardState, RoutingContext
from camex_ft.moe.layers.ffn import ExpertFFN, MergedFFN, MixtureFFN
from camex_ft.moe.merging import functional, reference
from camex_ft.moe.merging.domain_vectors import MergedProduct, Multiplier
from camex_ft.moe.routing.router import Grouping, Groups, TokenPositions, group
from camex_ft.moe.routing.segments import segments
from camex_ft.utils.registry import PROTOCOLS

HIDDEN, INNER, EXPERTS = 6, 8, 3


def read(context: RoutingContext, module: nn.Module, arguments: Mapping[str, Any]) -> ForwardState:
    """Take the mask from the call's arguments, as a backbone's family does."""
    return ForwardState(masks={"encoder": arguments.get("mask")}, cached=arguments.get("cached", 0))


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


# -- merged products from their parts


def product(
    experts: Tensor,
    base: Tensor | None,
    *,
    multiplier: Callable[[Tensor], Tensor | None] | None = None,
    **settings: Any,
) -> MergedProduct:
    """A merged product; a plain function is a multiplier that is not pointwise."""
    if multiplier is not None and not isinstance(multiplier, Multiplier):
        multiplier = Multiplier(multiplier)
    return MergedProduct(experts, base, multiplier=multiplier, **settings)


def merged_linear(
    x: Tensor, weights: Tensor, experts: Tensor, base: Tensor | None, **settings: Any
) -> Tensor:
    """The fast path."""
    return functional.merged_linear(x, weights, product(experts, base, **settings))


def merged_linear_reference(
    x: Tensor, weights: Tensor, experts: Tensor, base: Tensor | None, **settings: Any
) -> Tensor:
    """The reference implementation."""
    return reference.merged_linear_reference(x, weights, product(experts, base, **settings))


def multiplier_of(protocol: Any, *, training: bool, seed: int) -> Multiplier | None:
    """The multiplier of a registered protocol as a layer calls it, or None."""
    return protocol.multiplier and replace(protocol.multiplier, training=training, seed=seed)


# -- groups


def grouped(x: Tensor, positions: TokenPositions, router: Any, grouping: Grouping, *rest: Any) -> Groups:
    """Hidden states in groups, as a layer groups them; `rest` is the router state and the encoder's output."""
    if grouping.granularity == "segment":
        return segments(x, positions, router, grouping, *rest[:1])
    return group(x, positions, router, grouping, *rest)


def restored(groups: Groups, y: Tensor) -> Tensor:
    """Outputs of groups in the order of the tokens."""
    return y if groups.restore is None else groups.restore(y)
