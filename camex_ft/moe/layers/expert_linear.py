"""One matrix of a feed-forward layer as experts: the base class `ExpertMap`, and `ExpertLinear` with whole matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from camex_ft.moe.config import LayerSettings
from camex_ft.moe.curvature import Curvature
from camex_ft.moe.merging.base_expert import Bases, Carried, Means
from camex_ft.moe.merging.caching import Micro, ParameterCache, Shared
from camex_ft.moe.merging.domain_vectors import Keep, Recipe, transform
from camex_ft.moe.merging.functional import merged_linear, merged_linear_and_mean


class ExpertMap(nn.Module):
    """One matrix of a feed-forward layer as N experts: what `ExpertLinear` and `LowRankLinear` share.

    Parameters, where there are any: `base` [out, in], `base_bias` [out], `expert_bias` [N, out], `curvature`.
    Buffer, where the protocol keeps a statistic: `bias_statistic` [N, out].

    Args:
        shape: (out, in).
        settings: of the model's expert layers.

    Attributes:
        sharded: the parameters are whole only while the layer runs: nothing that is made of them is kept.
    """

    sharded = False
    base: Tensor | None
    base_bias: Tensor | None
    expert_bias: Tensor | None
    bias_statistic: Tensor | None

    def __init__(self, shape: tuple[int, int], settings: LayerSettings) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.count = settings.experts
        self.rule = settings.rule
        self.alpha = settings.alpha if settings.base else 1.0
        self.curvature: Curvature | None = None

    @property
    def own(self) -> Bases:
        """The base expert that is stored here; without one, what stands for none."""
        bias = None if self.base_bias is None else Carried(self.base_bias)
        return Bases(None if self.base is None else Carried(self.base), bias)

    def bias_vectors(self, bases: Bases) -> Tensor | None:
        """Return M_i (b_i - b_m), or b_i without a base; [N, out]; None without a bias."""
        if self.expert_bias is None or bases.bias is None:
            return self.expert_bias
        tau = self.expert_bias - bases.bias.base  # [N, out]
        return tau if self.curvature is None else self.curvature.forward_bias(tau)

    def merged_bias(self, weights: Tensor, bases: Bases | None = None, seed: int = 0) -> Tensor | None:
        """Return b_hat = b_m + alpha * sum_i s_i keep_i * M_i (b_i - b_m); [G, 1, out] or [G, L, out]; None without."""
        if self.expert_bias is None:
            return None
        bases = bases or self.own
        keep = self._keep(seed and seed + 1, self.bias_statistic)  # another draw than the weight's
        with torch.autocast(device_type=weights.device.type, enabled=False):
            vectors, s = self.bias_vectors(bases), weights.to(self.expert_bias.dtype)
            assert vectors is not None
            if bases.bias is None:
                merged = s @ vectors
            else:
                base = bases.bias.base
                kept = None if keep is None else keep((self.expert_bias - base).detach())
                merged = base + self.alpha * (s @ (vectors if kept is None else vectors * kept))
        return merged if weights.dim() == 3 else merged.unsqueeze(1)

    def _curved(self, settings: LayerSettings, like: Tensor, *, bias: bool) -> Curvature | None:
        """Return the curvature that the settings ask for, with the device and dtype of `like`."""
        if not settings.rank:
            return None
        return Curvature(
            out_features=self.out_features,
            in_features=self.in_features,
            experts=self.count,
            rank=settings.rank,
            bias=bias,
            kind=settings.curvature,
        ).to(like.device, like.dtype)

    def _keep(self, seed: int, statistic: Tensor | None = None) -> Keep | None:
        device = next(p.device for p in self.parameters())
        keep = self.rule.keep(training=self.training, seed=seed, device=device)
        return keep if keep is None or statistic is None else replace(keep, statistic=statistic)


class ExpertLinear(ExpertMap):
    """One matrix of a feed-forward layer as N experts and, where the protocol has one, a base expert.

    Parameters: `experts` [N, out, in], `base` [out, in], `expert_bias` [N, out], `base_bias` [out], `curvature`.
    Buffers, where the protocol keeps a statistic: `statistic` [N, out, in], `bias_statistic` [N, out].

    Args:
        weight: of the dense layer, copied into every expert and the base; [out, in].
        bias: of the dense layer; [out] or None.
        settings: of the model's expert layers.
        carried: the base expert comes from the layer before, and none is stored.
    """

    statistic: Tensor | None
    bias_statistic: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, settings: LayerSettings, *, carried: bool = False
    ) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), settings)
        n = settings.experts
        self.sparse = settings.top_k < n
        self.keep_vectors = settings.keep_vectors
        # a copied view would keep its strides (GPT-2 stores [in, out]), which a saved and loaded one has not
        weight = weight.detach().contiguous()
        self.experts = nn.Parameter(weight.repeat(n, 1, 1))
        self.expert_bias = None if bias is None else nn.Parameter(bias.detach().repeat(n, 1))
        self.carried, stored = carried, settings.base and not carried
        self.base = nn.Parameter(weight.clone()) if stored else None
        self.base_bias = nn.Parameter(bias.detach().clone()) if bias is not None and stored else None
        for name, parameter in (("statistic", self.experts), ("bias_statistic", self.expert_bias)):
            made = None if parameter is None or not settings.rule.statistic else torch.zeros_like(parameter)
            self.register_buffer(name, made)
        self.curvature = self._curved(settings, weight, bias=bias is not None)

    def forward(
        self,
        x: Tensor,
        weights: Tensor,
        micro: Micro | None = None,
        bases: Bases | None = None,
        *,
        seed: int | None = None,
        cache: ParameterCache | None = None,
    ) -> Tensor:
        """Return x E_hat^T + b_hat; [G, L, out].

        Args:
            x: [G, L, in].
            weights: routing weights; [G, N] or [G, L, N].
            micro: the micro-batch that this is, where an optimizer step has several.
            bases: the base expert, where it is carried.
            seed: of the protocol's multiplier in training, where it is random; None draws one from the process's
                generator, so that a run's seed and its checkpoints determine the mask.
            cache: of results of parameters that are declared unchanged; None makes them anew.
        """
        return self._forward(x, weights, micro, bases or self.own, seed, cache, mean=False)[0]

    def forward_and_mean(
        self,
        x: Tensor,
        weights: Tensor,
        micro: Micro | None,
        bases: Bases,
        cache: ParameterCache | None = None,
    ) -> tuple[Tensor, Means]:
        """Return the same, and the means over the experts of M_i tau_i: [out, in], and of the bias [out] or None."""
        y, mean = self._forward(x, weights, micro, bases, None, cache, mean=True)
        assert mean is not None
        with torch.autocast(device_type=x.device.type, enabled=False):
            vectors = self.bias_vectors(bases)
        return y, Means(mean, None if vectors is None else vectors.mean(0))

    def means(self, bases: Bases, cache: ParameterCache | None = None) -> Means:
        """Return the means alone."""
        x = self.experts.new_zeros(1, 1, self.experts.shape[2])
        return self.forward_and_mean(x, x.new_zeros(1, len(self.experts)), None, bases, cache)[1]

    @torch.no_grad()
    def merged(
        self, weights: Tensor, bases: Bases | None = None, cache: ParameterCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return E_hat [n, out, in] and b_hat [n, out] or None for routing weights [n, N], without a graph.

        The domain vectors are those of evaluation.
        """
        bases = bases or self.own
        recipe = self._recipe(0, bases)
        shared = self._shared(recipe, 0, None, cache)
        vectors = transform(recipe) if shared is None else shared.vectors  # [N, out, in]
        s, flat = weights.to(vectors.dtype), vectors.flatten(1)  # [n, N], [N, out * in]
        with torch.autocast(device_type=vectors.device.type, enabled=False):
            if recipe.base is None:
                mixed = self.alpha * (s @ flat)
            else:
                mixed = torch.addmm(recipe.base.flatten(), s, flat, alpha=self.alpha)
        bias = self.merged_bias(weights, bases)
        return mixed.view(-1, *vectors.shape[1:]), None if bias is None else bias.flatten(1)

    def _forward(
        self,
        x: Tensor,
        weights: Tensor,
        micro: Micro | None,
        bases: Bases,
        seed: int | None,
        cache: ParameterCache | None,
        *,
        mean: bool,
    ) -> tuple[Tensor, Tensor | None]:
        seed = self._seed(seed)
        recipe = self._recipe(seed, bases)
        shared = self._shared(recipe, seed, micro, cache)
        if shared is not None and shared.seed != seed:
            seed = shared.seed
            recipe = self._recipe(seed, bases)
        given: dict[str, Any] = {
            "alpha": self.alpha,
            "factors": recipe.factors,
            "sparse": self.sparse,
            "shared": shared,
            "last": micro is None or micro.last,
        }
        total = None
        if mean:
            y, total = merged_linear_and_mean(x, weights, *recipe[:2], **given)
        else:
            y = merged_linear(x, weights, *recipe[:2], keep=recipe.keep, **given)
        bias = self.merged_bias(weights, bases, seed)
        return (y if bias is None else y + bias.to(y.dtype)), total

    def _recipe(self, seed: int, bases: Bases) -> Recipe:
        factors = None if self.curvature is None else self.curvature.factors
        base = None if bases.weight is None else bases.weight.base
        return Recipe(self.experts, base, self._keep(seed, self.statistic), factors)

    def _shared(
        self, recipe: Recipe, seed: int, micro: Micro | None, cache: ParameterCache | None
    ) -> Shared | None:
        """Return T where it is made once for several calls, else None."""
        if (
            not self.keep_vectors
            or self.sharded
            or recipe.base is None
            or (recipe.keep is None and recipe.factors is None)
        ):
            return None  # nothing that costs work
        if self.training:
            if micro is None or recipe.by_rows or not torch.is_grad_enabled():
                return None
            return micro.step.share(self, recipe, seed, recipe.tensors(base=not self.carried))
        if cache is None or (torch.is_grad_enabled() and any(t.requires_grad for t in recipe.tensors())):
            return None
        return cache.share(self, recipe)

    def _seed(self, given: int | None) -> int:
        if not (self.rule.random and self.training):
            return 0
        return int(torch.randint(2**62, ()).item()) if given is None else given

    def expert(self, x: Tensor, i: int) -> Tensor:
        """Return x E_i^T + b_i, one expert by itself; [m, in] -> [m, out]."""
        bias = None if self.expert_bias is None else self.expert_bias[i]
        return nn.functional.linear(x, self.experts[i], bias)

    @torch.no_grad()
    def observe(self, whole: Callable[[Tensor], Tensor] = Tensor.detach) -> None:
        """Update the protocol's statistic from the gradients of an optimizer step, where it keeps one.

        `whole` gathers a tensor that is sharded; the statistic is not. The gradient of T is that of the experts without
        the multiplier, which is above 0.
        """
        for parameter, statistic, base in (
            (self.experts, self.statistic, self.base),
            (self.expert_bias, self.bias_statistic, self.base_bias),
        ):
            if parameter is None or statistic is None or base is None or parameter.grad is None:
                continue
            kept, gradient = None, whole(parameter.grad)
            keep = self._keep(0, statistic)
            if keep is not None:
                kept = keep(whole(parameter) - whole(base))
            updated = self.rule.update(statistic, gradient if kept is None else gradient / kept)
            statistic.copy_(torch.where(gradient.isfinite().all(), updated, statistic))
