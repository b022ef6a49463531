"""Feed-forward layers with experts: drop-in replacements for a backbone's dense ones.

    MergedFFN    one merged expert a group:  y = down(act(up(x)))  or  down(act(gate(x)) * up(x)), every map merged with
                 the layer's routing weights
    MixtureFFN   sparse mixture: y_t = sum_i s_ti FFN_i(x_t), per token

Both are [B, L, d] -> [B, L, d], read their mask from the model's `RoutingContext` and leave their routing there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from camex_ft.moe.balance import balance_loss
from camex_ft.moe.context import LayerRouting, Pass, RoutingContext
from camex_ft.moe.experts import ExpertLinear, LayerSettings
from camex_ft.moe.granularity import Groups, group
from camex_ft.moe.routing import Router

Activation = Callable[[Tensor], Tensor]
NOT_COMPILED = (
    "layers with experts have a backward pass of their own and run as they are, between compiled pieces"
)


class ExpertFFN(nn.Module):
    """What merged layers and mixtures share: maps, router, grouping, balance loss and the context.

    Args:
        weights: the dense layer's maps: "up", "down" and, if gated, "gate", each (weight [out, in], bias [out] or
            None).
        activation: of the dense layer.
        name: of the layer, unique in its model.
        stack: key of the layer's mask in the context.
        context: of the model.
        settings: of the model's expert layers.
        inner_dropout: probability after the activation.
        outer_dropout: probability after `down`.
    """

    def __init__(
        self,
        weights: Mapping[str, tuple[Tensor, Tensor | None]],
        activation: Activation,
        *,
        name: str,
        stack: str,
        context: RoutingContext,
        settings: LayerSettings,
        inner_dropout: float = 0.0,
        outer_dropout: float = 0.0,
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
        ).to(up.device)
        self.up = ExpertLinear(*weights["up"], settings)
        self.gate = ExpertLinear(*weights["gate"], settings) if "gate" in weights else None
        self.down = ExpertLinear(*weights["down"], settings)
        self.activation = activation
        self.inner_dropout = nn.Dropout(inner_dropout)
        self.outer_dropout = nn.Dropout(outer_dropout)

    def extra_repr(self) -> str:
        """Show the settings when the model is printed."""
        s = self.settings
        return f"experts={s.experts}, top_k={s.top_k}, rank={s.rank}, granularity={s.grouping.granularity}"

    def _mask(self, hidden: Tensor, current: Pass) -> Tensor | None:
        mask = current.masks.get(self.stack)
        length, granularity = hidden.shape[1], self.settings.grouping.granularity
        if current.cached and self.stack == "decoder" and granularity in ("sequence", "segment"):
            raise RuntimeError(
                f"{self.name}: routing by {granularity} needs all tokens at once, but a "
                "key-value cache holds the earlier ones: call the model or generate with use_cache=False"
            )
        if mask is not None and mask.shape[1] < length:
            raise ValueError(f"{self.name}: the mask has {mask.shape[1]} positions for {length} tokens")
        return None if mask is None else mask[:, -length:]

    def _route(self, hidden: Tensor) -> Groups:
        current = self.context.active or Pass()
        mask = self._mask(hidden, current)
        encoded = current.encoded if self.stack == "decoder" else None
        groups = group(hidden, mask, self.router, self.settings.grouping, encoded)
        current.layers[self.name] = LayerRouting(
            groups.routing.weights.detach(),
            groups.mask,
            balance_loss(
                groups.routing, top_k=self.settings.top_k, coef=self.settings.balance, mask=groups.mask
            ),
        )
        return groups


class MergedFFN(ExpertFFN):
    """A feed-forward layer whose experts' weights are merged for every group of tokens."""

    @torch.compiler.disable(reason=NOT_COMPILED)
    def forward(self, hidden: Tensor) -> Tensor:
        """Return the layer's output for hidden states; [B, L, d] -> [B, L, d]."""
        groups = self._route(hidden)
        x, s, micro = groups.x, groups.weights, (self.context.active or Pass()).micro
        inner = self.activation((self.gate or self.up)(x, s, micro))  # [G, L', f]
        if self.gate is not None:
            inner = inner * self.up(x, s, micro)
        return self.outer_dropout(groups.restore(self.down(self.inner_dropout(inner), s, micro)))


class MixtureFFN(ExpertFFN):
    """A sparse mixture: the outputs of each token's k experts are mixed; nothing is merged."""

    @torch.compiler.disable(reason=NOT_COMPILED)
    def forward(self, hidden: Tensor) -> Tensor:
        """Return y_t = sum_i s_ti FFN_i(x_t); [B, L, d] -> [B, L, d]."""
        groups = self._route(hidden)
        x, s = hidden.flatten(0, 1), groups.weights.flatten(0, 1)  # [M, d], [M, N]
        y = x.new_zeros(len(x), self.down.experts.shape[1])
        for i in range(self.settings.experts):
            tokens = s[:, i].nonzero().squeeze(1)  # [m]
            out = self._expert(x[tokens], i) * s[tokens, i, None].to(x.dtype)
            y = y.index_add(0, tokens, out.to(y.dtype))
        return self.outer_dropout(y.view(*hidden.shape[:2], -1))

    def _expert(self, x: Tensor, i: int) -> Tensor:
        inner = self.activation(self._map(self.gate or self.up, x, i))
        if self.gate is not None:
            inner = inner * self._map(self.up, x, i)
        return self._map(self.down, self.inner_dropout(inner), i)

    @staticmethod
    def _map(linear: ExpertLinear, x: Tensor, i: int) -> Tensor:
        bias = None if linear.expert_bias is None else linear.expert_bias[i]
        return nn.functional.linear(x, linear.experts[i], bias)
