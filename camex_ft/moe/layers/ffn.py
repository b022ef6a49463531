"""Feed-forward layers with experts: drop-in replacements for a backbone's dense ones.

    MergedFFN    one merged expert a group:  y = down(act(up(x)))  or  down(act(gate(x)) * up(x)), every map merged with
                 the layer's routing weights
    MixtureFFN   sparse mixture: y_t = sum_i s_ti FFN_i(x_t), per token

Both are [B, L, d] -> [B, L, d], read their mask from the model's `RoutingContext` and leave their routing there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from camex_ft.moe.context import LayerRouting, Pass, RoutingContext
from camex_ft.moe.layers.expert_linear import ExpertLinear, LayerSettings
from camex_ft.moe.layers.low_rank_expert_linear import LowRank, LowRankLinear
from camex_ft.moe.layers.propagation import Link
from camex_ft.moe.merging.base_expert import Bases, Means
from camex_ft.moe.merging.caching import CachedExperts, Map, merge_cached
from camex_ft.moe.merging.reference import traced
from camex_ft.moe.routing.grouping import Flow, Groups, group
from camex_ft.moe.routing.losses import Balance, balance_of
from camex_ft.moe.routing.router import Router

KEPT = 2  # merged experts that generating keeps, in units of the layer's own experts and base
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
        previous: the layer that the base expert is carried from, in dynamic merging; None for the first of a chain.
        inner_dropout: probability after the activation.
        outer_dropout: probability after `down`.
        low_rank: of experts that are of low rank, on a frozen base; None: they are whole matrices.

    Attributes:
        sharded: the parameters are whole only while the layer runs, so that nothing made of them is kept, and no other
            layer asks for them.
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
        make: Callable[..., Any]  # whole experts, as dynamic merging needs them, or those of low rank
        if low_rank is None:
            make = partial(ExpertLinear, settings=settings, carried=previous is not None)
        else:
            make = partial(LowRankLinear, settings=settings, low_rank=low_rank)
        self.low_rank = low_rank
        self.up: Any = make(*weights["up"])
        self.gate: Any = make(*weights["gate"]) if "gate" in weights else None
        self.down: Any = make(*weights["down"])
        self.activation = activation
        self.inner_dropout = nn.Dropout(inner_dropout)
        self.outer_dropout = nn.Dropout(outer_dropout)

    @property
    def linears(self) -> dict[str, Any]:
        """The maps by name, in the order in which they are applied: `ExpertLinear` or `LowRankLinear`."""
        found = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: linear for name, linear in found.items() if linear is not None}

    def extra_repr(self) -> str:
        """Show the settings when the model is printed."""
        s = self.settings
        return f"experts={s.experts}, top_k={s.top_k}, rank={s.rank}, granularity={s.grouping.granularity}"

    def _flow(self, hidden: Tensor, current: Pass) -> Flow:
        """Return where these tokens stand among those that went before.

        Raises:
            RuntimeError: a key-value cache holds earlier tokens and routing needs what is not known of them.
        """
        granularity = self.settings.grouping.granularity
        layout = current.layout(self.stack, hidden)
        if self.stack != "decoder":
            return Flow(layout)
        state = None if current.state is None else current.state.layers.get(self.name)
        if current.cached and granularity == "sequence":
            raise RuntimeError(
                f"{self.name}: routing by sequence needs all tokens at once, but a key-value cache holds the earlier "
                "ones: call the model or generate with use_cache=False"
            )
        if current.cached and self.settings.router.kind == "expert-choice":
            raise RuntimeError(
                f"{self.name}: with expert choice a token's routing depends on its whole sequence, but a key-value "
                "cache holds the earlier tokens: call the model with use_cache=False"
            )
        if current.cached and granularity == "segment" and state is None:
            raise RuntimeError(
                f"{self.name}: this key-value cache was not filled by this model, so that nothing is known of how its "
                "tokens were routed: compute the prompt with this model, or pass use_cache=False"
            )
        return Flow(layout, state, current.caching, current.encoded)

    def _route(self, hidden: Tensor) -> Groups:
        current = self.context.active or Pass()
        groups = group(hidden, self._flow(hidden, current), self.router, self.settings.grouping)
        if groups.state is not None:
            current.remembered[self.name] = groups.state
        served = groups.weights if groups.routing is None else groups.routing.weights
        current.layers[self.name] = LayerRouting(served.detach(), groups.mask, self._balance(groups))
        return groups

    def _balance(self, groups: Groups) -> Balance | None:
        """Return what the layer adds to the training loss; None where it has no routing of its own."""
        if groups.routing is None:
            return None
        given, chosen = self.settings, self.settings.router.kind == "expert-choice"  # balanced as it is made
        return balance_of(
            groups.routing,
            top_k=given.top_k,
            coef=0.0 if chosen else given.balance,
            z_coef=given.router.z_loss,
            mask=groups.mask,
        )


class MergedFFN(ExpertFFN):
    """A feed-forward layer whose experts' weights are merged for every group of tokens.

    Attributes:
        link: its place in a chain, where the base expert is carried from layer to layer.
        bargain: Nash weights of the last training step, where the protocol solves for them; [N].
    """

    link: Link | None
    bargain: Tensor | None

    def __init__(self, *args: Any, previous: MergedFFN | None = None, **kwargs: Any) -> None:
        super().__init__(*args, previous=previous, **kwargs)
        rule = self.settings.rule
        self.link = None if rule.step is None else Link(self, None if previous is None else previous.link)
        start = next(self.up.parameters()).new_zeros(self.settings.experts) if rule.bargains else None
        self.register_buffer("bargain", start)

    def carried(self) -> Mapping[str, Bases]:
        """Return the base expert that is carried to this layer, by map, made of the parameters; else nothing."""
        return (
            {} if self.link is None else self.link.bases(Pass(parameter_cache=self.context.parameter_cache))
        )

    @torch.compiler.disable(reason=NOT_COMPILED)
    def forward(self, hidden: Tensor) -> Tensor:
        """Return the layer's output for hidden states; [B, L, d] -> [B, L, d]."""
        groups = self._route(hidden)
        current = self.context.active or Pass()
        x, s, micro, cache = groups.x, groups.weights, current.micro, current.parameter_cache
        kept = self._kept(groups, current)
        bases = {} if kept is not None or self.link is None else self.link.bases(current)
        passes = self.link is not None and bool(bases) and (self.sharded or not self.link.caches(current))
        means: dict[str, Means | None] = dict.fromkeys(bases)

        def mapped(name: str, x: Tensor) -> Tensor:
            if kept is not None:
                return kept.apply(name, x)
            linear = getattr(self, name)
            if not (passes and self._needs_mean):
                seed = current.seed_of(f"{self.name}.{name}")
                made: Tensor = linear(x, s, micro, bases.get(name), seed=seed, cache=cache)
                return made
            made, means[name] = linear.forward_and_mean(x, s, micro, bases[name], cache)
            return made

        inner = self.activation(mapped("up" if self.gate is None else "gate", x))  # [G, L', f]
        if self.gate is not None:
            inner = inner * mapped("up", x)
        y = mapped("down", self.inner_dropout(inner))
        if passes and self.link is not None:
            self.link.pass_on(bases, means, current)
        return self.outer_dropout(groups.restore(y))

    @property
    def _needs_mean(self) -> bool:
        return self.settings.rule.needs_mean and self.link is not None and self.link.following is not None

    def _kept(self, groups: Groups, current: Pass) -> CachedExperts | None:
        """Return merged experts that are cached from token to token, where that pays: while generating."""
        cache = current.parameter_cache
        if self.sharded or cache is None:
            return None
        if self.low_rank is not None:  # two thin products a token cost less than matrices for every row
            return None
        served, state = groups.served, groups.state
        if served is None or state is None or self.training or torch.is_grad_enabled():
            return None
        dtype, device = self.up.experts.dtype, groups.x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        moment = cache.moment(self)
        kept = served.kept
        if kept is None or kept.rows is None or kept.dtype != dtype or kept.moment is not moment:
            most = KEPT * (self.settings.experts + 1)
            make = partial(self._merged, dtype, current)
            kept = merge_cached(groups.weights, kept, make, most=most, dtype=dtype, moment=moment)
        crossed = state.weights is not served.weights  # a segment ended: others serve the next token
        current.remembered[self.name] = replace(state, kept=kept.stale() if crossed else kept)
        return kept if kept.maps else None

    def _merged(self, dtype: torch.dtype, current: Pass, weights: Tensor) -> dict[str, Map]:
        """Return E_hat [n, out, in] and b_hat [n, out] or None of every map, for routing weights [n, N]."""
        bases = {} if self.link is None else self.link.bases(current)
        made = {}
        for name, linear in self.linears.items():
            weight, bias = linear.merged(weights, bases.get(name), current.parameter_cache)
            made[name] = (weight.to(dtype), None if bias is None else bias.to(dtype))
        return made


class MixtureFFN(ExpertFFN):
    """A sparse mixture: the outputs of each token's k experts are mixed; nothing is merged."""

    @torch.compiler.disable(reason=NOT_COMPILED)
    def forward(self, hidden: Tensor) -> Tensor:
        """Return y_t = sum_i s_ti FFN_i(x_t); [B, L, d] -> [B, L, d]."""
        groups = self._route(hidden)
        x, s = hidden.flatten(0, 1), groups.weights.flatten(0, 1)  # [M, d], [M, N]
        y = x.new_zeros(len(x), self.down.out_features)
        for i in range(self.settings.experts):
            if traced():  # which tokens an expert serves is not known then
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
