"""One matrix of a feed-forward layer as experts, and the settings that a model's expert layers share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from camex_ft.moe.curvature import Curvature
from camex_ft.moe.granularity import Grouping
from camex_ft.moe.linear import merged_linear
from camex_ft.moe.reuse import Micro, Reuse, Shared
from camex_ft.moe.routing import RouterSettings
from camex_ft.moe.vectors import Keep, Recipe, transform


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
        curvature: its kind, one of `curvature.KINDS`.
        alpha: merging step size.
        noise: draw routing noise in training.
        balance: coefficient of the balance loss.
        grouping: which tokens share routing weights.
        keep_vectors: keep transformed domain vectors while they stay the same.
        router: how routing weights are made.
    """

    rule: Rule
    experts: int
    top_k: int
    base: bool = True
    rank: int = 0
    curvature: str = "kronecker"
    alpha: float = 1.0
    noise: bool = True
    balance: float = 1e-2
    grouping: Grouping = field(default_factory=Grouping)
    keep_vectors: bool = True

    router: RouterSettings = field(default_factory=RouterSettings)

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
                out_features=out,
                in_features=width,
                experts=n,
                rank=settings.rank,
                bias=bias is not None,
                kind=settings.curvature,
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

    @torch.no_grad()
    def merged(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return E_hat [n, out, in] and b_hat [n, out] or None for routing weights [n, N], without a graph.

        The domain vectors are those of evaluation.
        """
        recipe = self._recipe(0)
        shared = self._shared(recipe, 0, None)
        vectors = transform(recipe) if shared is None else shared.vectors  # [N, out, in]
        s, flat = weights.to(vectors.dtype), vectors.flatten(1)  # [n, N], [N, out * in]
        with torch.autocast(device_type=vectors.device.type, enabled=False):
            if self.base is None:
                mixed = self.alpha * (s @ flat)
            else:
                mixed = torch.addmm(self.base.flatten(), s, flat, alpha=self.alpha)
        bias = self.merged_bias(weights)
        return mixed.view(-1, *vectors.shape[1:]), None if bias is None else bias.flatten(1)

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
