"""Feed-forward layers with experts: drop-in replacements for a backbone's dense ones.

    MergedFFN    one merged expert a group: y = down(act(up(x))) or down(act(gate(x)) * up(x)), every map merged with
                 the layer's routing weights
    MixtureFFN   sparse mixture: y_t = sum_i s_ti FFN_i(x_t), per token
    SharedBlock  either of them beside a shared expert, which every token meets: y + shared(x)

All are [B, L, d] -> [B, L, d]. The first two read their mask from the model's `RoutingContext` and leave their routing
there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from camex_ft.moe.config import LayerSettings
from camex_ft.moe.context import ForwardState, LayerRouting, RoutingContext
from camex_ft.moe.layers.expert_linear import ExpertLinear
from camex_ft.moe.layers.low_rank_expert_linear import LowRank, LowRankLinear
from camex_ft.moe.layers.propagation import LayerBases, Propagation
from camex_ft.moe.merging.base_expert import Means
from camex_ft.moe.merging.caching import CachedExperts, Map, merge_cached
from camex_ft.moe.merging.functional import traced
from camex_ft.moe.routing.losses import sum_losses
from camex_ft.moe.routing.router import Groups, Router, group
from camex_ft.moe.routing.segments import segments

CACHED = 2  # merged experts that generation caches, in units of the layer's own experts and base
Activation = Callable[[Tensor], Tensor]
NOT_COMPILED = (
    "layers with experts have a backward pass of their own and run as they are, between compiled pieces"
)


class ExpertFFN(nn.Module):
    """Base class of merged layers and mixtures: maps, router, grouping, balance loss and the context.

    Args:
        weights: the dense layer's maps: "up", "down" and, if gated, "gate", each (weight [out, in], bias [out] or
            None).
        activation: of the dense layer.
        name: of the layer, unique in its model.
        stack: key of the layer's mask in the context.
        context: of the model.
        settings: of the model's expert layers.
        previous: the layer that the base expert is propagated from, in dynamic merging; None for the first layer.
        inner_dropout: probability after the activation.
        outer_dropout: probability after `down`.
        low_rank: of low-rank experts on a frozen base; None: experts are whole matrices.

    Attributes:
        sharded: the parameters are whole only while the layer runs, so that nothing computed from them is cached, and
            no other layer reads them.
    """

    sharded = False

    def __init__(
        self,
        weights: Mapping[str, tuple[Tensor, Tensor | None]],
        activation: Activation,
        *,
        name: str,
        stack: str,
        context: RoutingContext,
        settings: LayerSettings,
        previous: MergedFFN | None = None,
        inner_dropout: float = 0.0,
        outer_dropout: float = 0.0,
        low_rank: LowRank | None = None,
    ) -> None:
        super().__init__()
        up = weights["up"][0]
        self.name, self.stack, self.context, self.settings = name, stack, context, settings
        self.router = Router(
            in_features=up.shape[1],
            experts=settings.experts,
            top_k=settings.top_k,
            noise=settings.noise,
            prior=settings.grouping.needs_prior,
            settings=settings.router,
        ).to(up.device)
        experts: Callable[..., Any]  # whole matrices, as dynamic merging needs them, or of low rank
        if low_rank is None:
            experts = partial(ExpertLinear, settings=settings, propagated=previous is not None)
        else:
            experts = partial(LowRankLinear, settings=settings, low_rank=low_rank)
        self.low_rank = low_rank
        self.up: Any = experts(*weights["up"])
        self.gate: Any = experts(*weights["gate"]) if "gate" in weights else None
        self.down: Any = experts(*weights["down"])
        self.activation = activation
        self.inner_dropout = nn.Dropout(inner_dropout)
        self.outer_dropout = nn.Dropout(outer_dropout)

    @property
    def linears(self) -> dict[str, Any]:
        """The maps by name, in the order in which they are applied: `ExpertLinear` or `LowRankLinear`."""
        maps = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: linear for name, linear in maps.items() if linear is not None}

    def extra_repr(self) -> str:
        """Show the settings when the model is printed."""
        s = self.settings
        return f"experts={s.experts}, top_k={s.top_k}, rank={s.rank}, granularity={s.grouping.granularity}"

    def _route(self, hidden: Tensor) -> tuple[Groups, ForwardState]:
        """Group and route hidden states [B, L, d], and leave the routing in the forward state, which is returned too.

        Raises:
            RuntimeError: a key-value cache holds earlier tokens, and routing needs what the cache does not hold.
        """
        settings, grouping = self.settings, self.settings.grouping
        state, positions = self.context.locate(self.stack, hidden)
        router_state = None
        if self.stack == "decoder":
            if state.router_state is not None:
                router_state = state.router_state.layers.get(self.name)
            if state.cached:
                self._check_cache(router_state is not None)
        if grouping.granularity == "segment":
            groups = segments(hidden, positions, self.router, grouping, router_state)
        else:
            groups = group(hidden, positions, self.router, grouping, router_state, state.encoded)
        if groups.state is not None:
            state.new_router_states[self.name] = groups.state
        sums, served = None, groups.weights
        if groups.routing is not None:
            expert_choice = settings.router.kind == "expert-choice"  # balanced by construction
            served = groups.routing.weights
            sums = partial(
                sum_losses,
                groups.routing,
                top_k=settings.top_k,
                coef=0.0 if expert_choice else settings.balance,
                z_coef=settings.router.z_loss,
                mask=groups.mask,
            )
            if torch.is_grad_enabled():
                sums = partial(
                    replace, sums()
                )  # computed before the maps: autograd adds up gradients in this order
        state.layers[self.name] = LayerRouting(served.detach(), groups.mask, sums)
        return groups, state

    def _check_cache(self, filled: bool) -> None:
        """Raise `RuntimeError` where this layer cannot go on from a key-value cache, `filled` by it or not."""
        granularity = self.settings.grouping.granularity
        if granularity == "sequence":
            raise RuntimeError(
                f"{self.name}: routing by sequence needs all tokens at once, but a key-value cache holds the earlier "
                "ones: call the model or generate with use_cache=False"
            )
        if self.settings.router.kind == "expert-choice":
            raise RuntimeError(
                f"{self.name}: with expert choice a token's routing depends on its whole sequence, but a key-value "
                "cache holds the earlier tokens: call the model with use_cache=False"
            )
        if granularity == "segment" and not filled:
            raise RuntimeError(
                f"{self.name}: this key-value cache was not filled by this model, so that the routing of its tokens is "
                "unknown: compute the prompt with this model, or pass use_cache=False"
            )


class MergedFFN(ExpertFFN):
    """A feed-forward layer whose experts' weights are merged for every group of tokens.

    Attributes:
        propagation: of the base expert to and from this layer, in dynamic merging; else None.
        bargain: Nash weights of the last training step, where the protocol solves for them; [N].
    """

    propagation: Propagation | None
    bargain: Tensor | None

    def __init__(self, *args: Any, previous: MergedFFN | None = None, **kwargs: Any) -> None:
        super().__init__(*args, previous=previous, **kwargs)
        rule = self.settings.rule
        before = None if previous is None else previous.propagation
        self.propagation = None if rule.step is None else Propagation(self, before)
        start = next(self.up.parameters()).new_zeros(self.settings.experts) if rule.bargains else None
        self.register_buffer("bargain", start)

    def propagated_bases(self) -> LayerBases:
        """Return the base expert that is propagated to this layer, by map, computed from the parameters; else {}."""
        if self.propagation is None:
            return {}
        return self.propagation.bases(ForwardState(parameter_cache=self.context.parameter_cache))

    @torch.compiler.disable(reason=NOT_COMPILED)
    def forward(self, hidden: Tensor) -> Tensor:
        """Return the layer's output for hidden states; [B, L, d] -> [B, L, d]."""
        propagation = self.propagation
        groups, state = self._route(hidden)
        x, s = groups.x, groups.weights
        experts = self._cached_experts(groups, state)
        bases = {} if experts is not None or propagation is None else propagation.bases(state)
        passes_on = False
        if propagation is not None and bases and propagation.following is not None:
            passes_on = self.sharded or state.parameter_cache is None or not propagation.is_cached(state)
        means: dict[str, Means | None] = dict.fromkeys(bases)

        def linear(name: str, x: Tensor) -> Tensor:
            if experts is not None:
                return experts.apply(name, x)
            experts_map = getattr(self, name)
            if passes_on and self.settings.rule.needs_mean:
                y, means[name] = experts_map.forward_and_mean(x, s, bases[name], state=state)
                return y
            seed = None if state.seed is None else state.seed_of(f"{self.name}.{name}")
            return experts_map(x, s, bases.get(name), state=state, seed=seed)

        inner = self.activation(linear("up" if self.gate is None else "gate", x))  # [G, L', f]
        if self.gate is not None:
            inner = inner * linear("up", x)
        y = linear("down", self.inner_dropout(inner))
        if passes_on and propagation is not None:
            propagation.pass_on(bases, means, state)
        return self.outer_dropout(y if groups.restore is None else groups.restore(y))

    def _cached_experts(self, groups: Groups, state: ForwardState) -> CachedExperts | None:
        """Return merged experts that are cached from token to token, where that pays: in generation."""
        cache, served, router_state = state.parameter_cache, groups.served, groups.state
        if self.sharded or cache is None or served is None or router_state is None:
            return None
        if self.low_rank is not None:  # two thin products a token cost less than matrices for every row
            return None
        if self.training or torch.is_grad_enabled():
            return None
        dtype, device = self.up.experts.dtype, groups.x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        moment, experts = cache.moment(self), served.merged
        if experts is None or experts.rows is None or experts.dtype != dtype or experts.moment is not moment:
            most = CACHED * (self.settings.experts + 1)
            merge = partial(self._merge, dtype, state)
            experts = merge_cached(groups.weights, experts, merge, most=most, dtype=dtype, moment=moment)
        crossed = router_state.weights is not served.weights  # a segment ended: others serve the next token
        after = replace(router_state, merged=experts.stale() if crossed else experts)
        state.new_router_states[self.name] = after
        return experts if experts.maps else None

    def _merge(self, dtype: torch.dtype, state: ForwardState, weights: Tensor) -> dict[str, Map]:
        """Return E_hat [n, out, in] and b_hat [n, out] or None of every map, for routing weights [n, N]."""
        bases = {} if self.propagation is None else self.propagation.bases(state)
        maps = {}
        for name, linear in self.linears.items():
            weight, bias = linear.merged(weights, bases.get(name), state.parameter_cache)
            maps[name] = (weight.to(dtype), None if bias is None else bias.to(dtype))
        return maps


class MixtureFFN(ExpertFFN):
    """A sparse mixture: the outputs of each token's k experts are mixed; nothing is merged."""

    @torch.compiler.disable(reason=NOT_COMPILED)
    def forward(self, hidden: Tensor) -> Tensor:
        """Return y_t = sum_i s_ti FFN_i(x_t); [B, L, d] -> [B, L, d]."""
        groups, _ = self._route(hidden)
        x, s = hidden.flatten(0, 1), groups.weights.flatten(0, 1)  # [M, d], [M, N]
        y = x.new_zeros(len(x), self.down.out_features)
        for i in range(self.settings.experts):
            if traced():  # the tokens that an expert serves are unknown then
                y = y + self._expert(x, i) * s[:, i, None].to(x.dtype)
                continue
            tokens = s[:, i].nonzero().squeeze(1)  # [m]
            out = self._expert(x[tokens], i) * s[tokens, i, None].to(x.dtype)
            y = y.index_add(0, tokens, out.to(y.dtype))
        return self.outer_dropout(y.view(*hidden.shape[:2], -1))

    def _expert(self, x: Tensor, i: int) -> Tensor:
        inner = self.activation((self.gate or self.up).expert(x, i))
        if self.gate is not None:
            inner = inner * self.up.expert(x, i)
        return self.down.expert(self.inner_dropout(inner), i)


class SharedBlock(nn.Module):
    """Block of a backbone's mixture with shared experts: `experts`, y, and the shared expert beside them.

        y + shared(x)      or, where it has a gate g,      y + sigmoid(x g^T) shared(x)

    Args:
        block: of the backbone; its shared modules are taken over under their names, as is its module `experts`.
        shared: names of the shared expert and of its gate, if any.
    """

    def __init__(self, block: nn.Module, shared: Sequence[str]) -> None:
        super().__init__()
        self.shared = tuple(shared)
        for name in ("experts", *shared):
            self.add_module(name, block.get_submodule(name))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the block's output for hidden states; [B, L, d] -> [B, L, d]."""
        expert, *gates = (self.get_submodule(name) for name in self.shared)
        y: Tensor = expert(hidden)
        for gate in gates:
            y = torch.sigmoid(gate(hidden)) * y
        routed: Tensor = self.get_submodule("experts")(hidden)
        return routed + y
