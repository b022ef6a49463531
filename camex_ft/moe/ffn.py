"""Feed-forward layers with experts: drop-in replacements for a backbone's dense ones.

    MergedFFN    one merged expert a group:  y = down(act(up(x)))  or  down(act(gate(x)) * up(x)), every map merged with
                 the layer's routing weights
    MixtureFFN   sparse mixture: y_t = sum_i s_ti FFN_i(x_t), per token

Both are [B, L, d] -> [B, L, d], read their mask from the model's `RoutingContext` and leave their routing there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from camex_ft.moe.balance import balance_loss
from camex_ft.moe.context import LayerRouting, Pass, RoutingContext
from camex_ft.moe.curvature import Curvature
from camex_ft.moe.granularity import Grouping, Groups, group
from camex_ft.moe.linear import merged_linear
from camex_ft.moe.reuse import Micro, Reuse, Shared
from camex_ft.moe.routing import Router
from camex_ft.moe.vectors import Keep, Recipe

Activation = Callable[[Tensor], Tensor]


class Rule(Protocol):
    """What a layer needs of a merging protocol."""

    @property
    def random(self) -> bool:
        """Whether the multiplier is drawn anew for every training step."""

    def keep(self, *, training: bool, seed: int, device: torch.device) -> Keep | None:
        """Return the multiplier of domain vectors as a function of tau."""


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """Settings that all expert layers of a model share.

    Attributes:
        rule: the merging protocol's multiplier.
        experts, top_k: N and k.
        base: store a base expert E_m.
        rank: R of the curvature; 0 has none.
        alpha: merging step size.
        noise: draw routing noise in training.
        balance: coefficient of the balance loss.
        grouping: which tokens share routing weights.
        keep_vectors: keep transformed domain vectors while they stay the same.
    """

    rule: Rule
    experts: int
    top_k: int
    base: bool = True
    rank: int = 0
    alpha: float = 1.0
    noise: bool = True
    balance: float = 1e-2
    grouping: Grouping = field(default_factory=Grouping)
    keep_vectors: bool = True


class ExpertLinear(nn.Module):
    """One matrix of a feed-forward layer as N experts and, where the protocol has one, a base expert.

    Parameters: `experts` [N, out, in], `base` [out, in], `expert_bias` [N, out], `base_bias` [out], `curvature`.

    Args:
        weight: of the dense layer, copied into every expert and the base; [out, in].
        bias: of the dense layer; [out] or None.
        settings: of the model's expert layers.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, settings: LayerSettings) -> None:
        super().__init__()
        n = settings.experts
        self.rule = settings.rule
        self.sparse = settings.top_k < n
        self.reuse = Reuse() if settings.keep_vectors else None
        self.alpha = settings.alpha if settings.base else 1.0
        # a copied view would keep its strides (GPT-2 stores [in, out]), which a saved and loaded one has not
        weight = weight.detach().contiguous()
        self.experts = nn.Parameter(weight.repeat(n, 1, 1))
        self.expert_bias = None if bias is None else nn.Parameter(bias.detach().repeat(n, 1))
        self.base = nn.Parameter(weight.clone()) if settings.base else None
        self.base_bias = nn.Parameter(bias.detach().clone()) if bias is not None and settings.base else None
        self.curvature = None
        if settings.rank:
            out, width = weight.shape
            self.curvature = Curvature(
                out_features=out, in_features=width, experts=n, rank=settings.rank, bias=bias is not None
            ).to(weight.device, weight.dtype)

    def forward(self, x: Tensor, weights: Tensor, micro: Micro | None = None) -> Tensor:
        """Return x E_hat^T + b_hat; [G, L, out].

        Args:
            x: [G, L, in].
            weights: routing weights; [G, N] or [G, L, N].
            micro: the micro-batch that this is, where an optimizer step has several.
        """
        seed = self._draw()
        recipe = self._recipe(seed)
        shared = self._shared(recipe, seed, micro)
        if shared is not None and shared.seed != seed:
            seed = shared.seed
            recipe = self._recipe(seed)
        y = merged_linear(
            x,
            weights,
            *recipe[:2],
            alpha=self.alpha,
            keep=recipe.keep,
            factors=recipe.factors,
            sparse=self.sparse,
            shared=shared,
            last=micro is None or micro.last,
        )
        bias = self.merged_bias(weights, seed)
        return y if bias is None else y + bias.to(y.dtype)

    def train(self, mode: bool = True) -> ExpertLinear:
        """Choose training or evaluation; forget what was kept, but not between two micro-batches in training."""
        if self.reuse is not None and not (mode and self.training):
            self.reuse.forget()
        return super().train(mode)

    def _recipe(self, seed: int) -> Recipe:
        factors = None if self.curvature is None else self.curvature.factors
        return Recipe(self.experts, self.base, self._keep(seed), factors)

    def _shared(self, recipe: Recipe, seed: int, micro: Micro | None) -> Shared | None:
        if self.reuse is None or self.base is None or (recipe.keep is None and recipe.factors is None):
            return None  # nothing that costs work
        if self.training:
            if micro is None or recipe.by_rows or not torch.is_grad_enabled():
                return None
            return self.reuse.within(micro.step, recipe, seed)
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        return None if learns else self.reuse.kept(recipe)

    def _draw(self) -> int:
        # from the process's generator, so that a run's seed and its checkpoints determine the mask
        return int(torch.randint(2**62, ()).item()) if self.rule.random and self.training else 0

    def _keep(self, seed: int) -> Keep | None:
        return self.rule.keep(training=self.training, seed=seed, device=self.experts.device)

    def merged_bias(self, weights: Tensor, seed: int = 0) -> Tensor | None:
        """Return b_hat = b_m + alpha * sum_i s_i keep_i * M_i (b_i - b_m); [G, 1, out] or [G, L, out]; None without."""
        if self.expert_bias is None:
            return None
        keep = self._keep(seed and seed + 1)  # another draw than the weight's
        with torch.autocast(device_type=weights.device.type, enabled=False):
            s = weights.to(self.expert_bias.dtype)
            if self.base_bias is None:
                merged = s @ self.expert_bias
            else:
                tau = self.expert_bias - self.base_bias  # [N, out]
                kept = None if keep is None else keep(tau.detach())
                curved = tau if self.curvature is None else self.curvature.forward_bias(tau)
                vectors = curved if kept is None else curved * kept
                merged = self.base_bias + self.alpha * (s @ vectors)
        return merged if weights.dim() == 3 else merged.unsqueeze(1)


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
