"""A layer's place in a chain of dynamic merging: where its base expert comes from, and what it passes on.

In training a layer makes the base expert of the next one while it runs, with what its own merging needs anyway, and
leaves it in the `Pass`; gradients flow back from layer to layer. So it does in evaluation, unless the pass has a cache:
then base experts are made once and cached. A layer that runs by itself, outside a pass, makes those before it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from camex_ft.moe.merging.base_expert import Bases, Carried, Means, Vectors, gram_matrix
from camex_ft.moe.merging.nash import nash_weights
from camex_ft.moe.merging.reference import traced

if TYPE_CHECKING:
    from camex_ft.moe.config import LayerSettings
    from camex_ft.moe.context import Pass
    from camex_ft.moe.layers.expert_linear import ExpertLinear

Carry = Mapping[str, Bases]


class ChainedLayer(Protocol):
    """Attributes of a merged layer that its link reads; `ffn.MergedFFN` has them."""

    name: str
    settings: LayerSettings
    training: bool
    bargain: Tensor | None
    link: Link | None

    @property
    def linears(self) -> Mapping[str, ExpertLinear]:
        """The layer's maps by name."""


class Link:
    """The link of one layer.

    Args:
        layer: whose link this is.
        previous: the link of the layer before it in the chain; None for the first, which stores the base expert.
    """

    def __init__(self, layer: ChainedLayer, previous: Link | None) -> None:
        self.layer, self.previous = layer, previous
        self.following: Link | None = None
        if previous is not None:
            previous.following = self

    def bases(self, current: Pass) -> Carry:
        """Return the layer's base expert by map, from the pass or made anew."""
        if self.previous is None:
            return {name: linear.own for name, linear in self.layer.linears.items()}
        found = current.carried.get(self.layer.name)
        if found is None:
            before = self.previous.bases(current)
            found = (
                self.previous.made(before, current)
                if not self.caches(current)
                else self._settled(before, current)
            )
            current.carried[self.layer.name] = found
        return found

    def pass_on(self, bases: Carry, means: Mapping[str, Means | None], current: Pass) -> None:
        """Leave the next layer's base expert in the pass."""
        if self.following is not None:
            carried = self._advance(bases, means, current)
            # what runs again for gradient checkpointing leaves the first one, whose graph is in use, where it is
            current.carried.setdefault(self.following.layer.name, carried)

    def made(self, bases: Carry, current: Pass) -> Carry:
        """Return the next layer's base expert, from this layer's parameters alone."""
        needed = self.layer.settings.rule.needs_mean
        linears = self.layer.linears.items()
        cache = current.parameter_cache
        means = {n: m.means(bases[n], cache) if needed else None for n, m in linears}
        return self._advance(bases, means, current)

    def caches(self, current: Pass) -> bool:
        """Return whether base experts are cached in a pass, and not passed on from layer to layer."""
        settings = self.layer.settings
        return current.parameter_cache is not None and settings.keep_vectors and not torch.is_grad_enabled()

    def _settled(self, before: Carry, current: Pass) -> Carry:
        """Return the layer's base expert without a graph, cached while the chain before it stays the same."""
        previous, cache = self.previous, current.parameter_cache
        assert previous is not None and cache is not None
        carried = [part for base in before.values() for part in (base.weight, base.bias) if part is not None]
        tensors = [t for part in carried for t in part if t is not None]
        own = previous.layer.linears.values()
        made_of = (*tensors, *(p for linear in own for p in linear.parameters()))
        return cache.get(self, made_of, lambda: previous.made(before, current))

    def _advance(self, bases: Carry, means: Mapping[str, Means | None], current: Pass) -> Carry:
        step, following = self.layer.settings.rule.step, self.following
        assert step is not None and following is not None
        device = following.layer.linears["up"].experts.device  # differs where a model is spread over several
        gram, bargain = partial(self._gram, bases, current), partial(self._bargain, bases, current)

        def carry(experts: Tensor | None, carried: Carried | None, mean: Tensor | None) -> Carried | None:
            if experts is None or carried is None:
                return None
            made = step(carried, mean=mean, vectors=Vectors(experts, carried.base, gram, bargain))
            return Carried._make(None if part is None else part.to(device) for part in made)

        made = {}
        with torch.autocast(device_type=self.layer.linears["up"].experts.device.type, enabled=False):
            for name, linear in self.layer.linears.items():
                (weight, bias), (mean, bias_mean) = bases[name], means[name] or (None, None)
                made[name] = Bases(
                    carry(linear.experts, weight, mean), carry(linear.expert_bias, bias, bias_mean)
                )
        return made

    def _gram(self, bases: Carry, current: Pass) -> Tensor:
        """Return the Gram matrix of the experts' domain vectors, each with all matrices and biases; [N, N], float64."""
        known = current.grams.get(self.layer.name)
        if known is None:
            parts = [_gram(linear, bases[name]) for name, linear in self.layer.linears.items()]
            known = current.grams[self.layer.name] = torch.stack(parts).sum(0)
        return known

    def _bargain(self, bases: Carry, current: Pass) -> Tensor:
        """Return the Nash weights of the layer's experts; [N], float64."""
        layer = self.layer
        known = current.bargains.get(layer.name)
        if known is None:
            known = nash_weights(self._gram(bases, current), start=layer.bargain)
            if layer.training and layer.bargain is not None and not traced():
                with torch.no_grad():
                    layer.bargain.copy_(known)  # where the next step starts from
            current.bargains[layer.name] = known
        return known


def continues(
    linears: Mapping[str, ExpertLinear], weights: Mapping[str, tuple[Tensor, Tensor | None]]
) -> bool:
    """Return whether a layer with these dense maps can take its base expert from one with these experts."""
    there = {n: (m.experts.shape[1:], m.expert_bias is None) for n, m in linears.items()}
    return there == {name: (weight.shape, bias is None) for name, (weight, bias) in weights.items()}


def chains(layers: Sequence[ChainedLayer]) -> list[list[str]]:
    """Return the layers' names by chain, in order; nothing where base experts are not carried."""
    found: list[list[str]] = []
    for layer in layers:
        link = layer.link
        if link is not None and link.previous is None:
            chain = [layer.name]
            while link.following is not None:
                link = link.following
                chain.append(link.layer.name)
            found.append(chain)
    return found


@torch.no_grad()
def _gram(linear: ExpertLinear, bases: Bases) -> Tensor:
    """Return the Gram matrix of one map's domain vectors, its bias's with it; [N, N]."""
    assert bases.weight is not None
    gram = gram_matrix(linear.experts, bases.weight.base)
    if linear.expert_bias is not None and bases.bias is not None:
        gram = gram + gram_matrix(linear.expert_bias, bases.bias.base)
    return gram
