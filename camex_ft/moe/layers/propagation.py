"""Propagation of the base expert from layer to layer, in dynamic merging.

In training a layer computes the base expert of the next one while it runs, from values that its own merging needs
anyway, and leaves it in the `ForwardState`; gradients flow back from layer to layer. In evaluation it does the same,
unless the forward pass has a cache of parameters' results: then base experts are computed once and cached. A layer that
runs alone, outside of a forward pass, computes those of the layers before it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from camex_ft.moe.config import LayerSettings
from camex_ft.moe.context import ForwardState
from camex_ft.moe.layers.expert_linear import ExpertLinear
from camex_ft.moe.merging.base_expert import BaseExperts, LayerVectors, Means, PropagatedBase, gram_matrix
from camex_ft.moe.merging.functional import traced
from camex_ft.moe.merging.nash import nash_weights

LayerBases = Mapping[str, BaseExperts]


class PropagatingLayer(Protocol):
    """Attributes of a merged layer that propagation reads; `ffn.MergedFFN` has them."""

    name: str
    settings: LayerSettings
    training: bool
    bargain: Tensor | None
    propagation: Propagation | None
    up: ExpertLinear

    @property
    def linears(self) -> Mapping[str, ExpertLinear]:
        """The layer's maps by name."""


class Propagation:
    """Propagation of the base expert to and from one layer.

    Args:
        layer: the layer.
        previous: of the layer before it; None for the first layer, which stores the base expert.

    Attributes:
        following: of the layer after it, or None.
    """

    def __init__(self, layer: PropagatingLayer, previous: Propagation | None) -> None:
        self.layer, self.previous = layer, previous
        self.following: Propagation | None = None
        if previous is not None:
            previous.following = self

    def bases(self, state: ForwardState) -> LayerBases:
        """Return the layer's base expert by map: stored, from the forward pass, or computed anew."""
        if self.previous is None:
            return {name: linear.stored_base for name, linear in self.layer.linears.items()}
        bases = state.base_experts.get(self.layer.name)
        if bases is None:
            before = self.previous.bases(state)
            if self.is_cached(state):
                bases = self._cached(self.previous, before, state)
            else:
                bases = self.previous.following_bases(before, state)
            state.base_experts[self.layer.name] = bases
        return bases

    def pass_on(self, bases: LayerBases, means: Mapping[str, Means | None], state: ForwardState) -> None:
        """Leave the next layer's base expert in the state of the forward pass."""
        if self.following is not None:
            following = self._advance(bases, means, state)
            # gradient checkpointing runs a layer again: the first result, whose graph is in use, stays
            state.base_experts.setdefault(self.following.layer.name, following)

    def following_bases(self, bases: LayerBases, state: ForwardState) -> LayerBases:
        """Return the next layer's base expert, from this layer's parameters alone."""
        needed = self.layer.settings.rule.needs_mean
        linears = self.layer.linears.items()
        means = {name: linear.means(bases[name], state) if needed else None for name, linear in linears}
        return self._advance(bases, means, state)

    def is_cached(self, state: ForwardState) -> bool:
        """Return whether base experts are cached in a forward pass, and not passed on from layer to layer."""
        settings = self.layer.settings
        return state.parameter_cache is not None and settings.keep_vectors and not torch.is_grad_enabled()

    def _cached(self, previous: Propagation, before: LayerBases, state: ForwardState) -> LayerBases:
        """Return the layer's base expert without a graph, cached while the layers before it stay the same."""
        assert state.parameter_cache is not None
        parts = [part for bases in before.values() for part in bases if part is not None]
        sources = [tensor for part in parts for tensor in part if tensor is not None]
        for linear in previous.layer.linears.values():
            sources += linear.parameters()
        compute = partial(previous.following_bases, before, state)
        return state.parameter_cache.get(self, sources, compute)

    def _advance(
        self, bases: LayerBases, means: Mapping[str, Means | None], state: ForwardState
    ) -> LayerBases:
        """Apply the protocol's step to every weight and bias."""
        rule, advance, following = self.layer.settings.rule, self.layer.settings.rule.step, self.following
        assert advance is not None and following is not None
        device = following.layer.up.experts.device  # differs where a model is spread over several
        gram, bargain = partial(self._gram, bases, state), partial(self._bargain, bases, state)

        def step(
            experts: Tensor | None, base: PropagatedBase | None, mean: Tensor | None
        ) -> PropagatedBase | None:
            if experts is None or base is None:
                return None
            arguments: dict[str, Any] = {"mean": mean} if rule.needs_mean else {}
            if rule.bargains:
                arguments["vectors"] = LayerVectors(experts, base.base, gram, bargain)
            moved = advance(base, **arguments)
            return PropagatedBase._make(None if part is None else part.to(device) for part in moved)

        following_bases = {}
        with torch.autocast(device_type=self.layer.up.experts.device.type, enabled=False):
            for name, linear in self.layer.linears.items():
                (weight, bias), (mean, bias_mean) = bases[name], means[name] or (None, None)
                following_bases[name] = BaseExperts(
                    step(linear.experts, weight, mean), step(linear.expert_bias, bias, bias_mean)
                )
        return following_bases

    def _gram(self, bases: LayerBases, state: ForwardState) -> Tensor:
        """Return the Gram matrix of the experts' domain vectors, each with all matrices and biases; [N, N], float64."""
        gram = state.grams.get(self.layer.name)
        if gram is None:
            parts = [gram_of(linear, bases[name]) for name, linear in self.layer.linears.items()]
            gram = state.grams[self.layer.name] = torch.stack(parts).sum(0)
        return gram

    def _bargain(self, bases: LayerBases, state: ForwardState) -> Tensor:
        """Return the Nash weights of the layer's experts; [N], float64."""
        layer = self.layer
        weights = state.nash_weights.get(layer.name)
        if weights is None:
            weights = nash_weights(self._gram(bases, state), start=layer.bargain)
            if layer.training and layer.bargain is not None and not traced():
                with torch.no_grad():
                    layer.bargain.copy_(weights)  # the start of the next step
            state.nash_weights[layer.name] = weights
        return weights


def continues(
    linears: Mapping[str, ExpertLinear], weights: Mapping[str, tuple[Tensor, Tensor | None]]
) -> bool:
    """Return whether a layer with these dense maps can take its base expert from one with these experts."""
    shapes = {n: (m.experts.shape[1:], m.expert_bias is None) for n, m in linears.items()}
    return shapes == {name: (weight.shape, bias is None) for name, (weight, bias) in weights.items()}


def propagation_paths(layers: Sequence[PropagatingLayer]) -> list[list[str]]:
    """Return the names of the layers along which each base expert is propagated, in order; nothing without any."""
    paths: list[list[str]] = []
    for layer in layers:
        propagation = layer.propagation
        if propagation is not None and propagation.previous is None:
            path = [layer.name]
            while propagation.following is not None:
                propagation = propagation.following
                path.append(propagation.layer.name)
            paths.append(path)
    return paths


@torch.no_grad()
def gram_of(linear: ExpertLinear, bases: BaseExperts) -> Tensor:
    """Return the Gram matrix of one map's domain vectors, its bias's with it; [N, N]."""
    assert bases.weight is not None
    gram = gram_matrix(linear.experts, bases.weight.base)
    if linear.expert_bias is not None and bases.bias is not None:
        gram = gram + gram_matrix(linear.expert_bias, bases.bias.base)
    return gram
