"""One matrix of a feed-forward layer as experts: the base class `ExpertMap`, and `ExpertLinear` with whole matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from camex_ft.moe.config import LayerSettings
from camex_ft.moe.context import ForwardState
from camex_ft.moe.curvature import Curvature, make_curvature
from camex_ft.moe.merging.base_expert import BaseExperts, Means, PropagatedBase
from camex_ft.moe.merging.caching import ParameterCache
from camex_ft.moe.merging.domain_vectors import CachedVectors, MergedProduct, Multiplier
from camex_ft.moe.merging.functional import merged_linear, merged_linear_and_mean


class ExpertMap(nn.Module):
    """One matrix of a feed-forward layer as N experts: common part of `ExpertLinear` and `LowRankLinear`.

    Parameters, where there are any: `base` [out, in], `base_bias` [out], `expert_bias` [N, out], `curvature`.
    Buffer, where the protocol has a statistic: `bias_statistic` [N, out].

    Args:
        shape: (out, in).
        settings: of the model's expert layers.

    Attributes:
        sharded: the parameters are whole only while the layer runs, so that nothing computed from them is cached.
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
        self.random = settings.rule.multiplier is not None and settings.rule.multiplier.random
        self.alpha = settings.alpha if settings.base else 1.0
        self.curvature: Curvature | None = None

    @property
    def stored_base(self) -> BaseExperts:
        """The base expert that is stored here, None where there is none."""
        bias = None if self.base_bias is None else PropagatedBase(self.base_bias)
        return BaseExperts(None if self.base is None else PropagatedBase(self.base), bias)

    def bias_vectors(self, bases: BaseExperts) -> Tensor | None:
        """Return M_i (b_i - b_m), or b_i without a base; [N, out]; None without a bias."""
        if self.expert_bias is None or bases.bias is None:
            return self.expert_bias
        tau = self.expert_bias - bases.bias.base  # [N, out]
        return tau if self.curvature is None else self.curvature.transform_bias(tau)

    def merged_bias(self, weights: Tensor, bases: BaseExperts | None = None, seed: int = 0) -> Tensor | None:
        """Return b_hat = b_m + alpha * sum_i s_i multiplier_i * M_i (b_i - b_m); [G, 1, out] or [G, L, out], or
        None."""
        if self.expert_bias is None:
            return None
        bases = bases or self.stored_base
        with torch.autocast(device_type=weights.device.type, enabled=False):
            vectors, s = self.bias_vectors(bases), weights.to(self.expert_bias.dtype)
            assert vectors is not None
            if bases.bias is None:
                merged = s @ vectors
            else:
                base = bases.bias.base
                rule = self.multiplier(
                    seed and seed + 1, self.bias_statistic
                )  # another draw than the weight's
                multiplier = None if rule is None else rule((self.expert_bias - base).detach())
                merged = base + self.alpha * (s @ (vectors if multiplier is None else vectors * multiplier))
        return merged if weights.dim() == 3 else merged.unsqueeze(1)

    def multiplier(self, seed: int, statistic: Tensor | None = None) -> Multiplier | None:
        """Return the protocol's multiplier in the present mode, or None."""
        multiplier = self.rule.multiplier
        if multiplier is None:
            return None
        return replace(multiplier, training=self.training, seed=seed, statistic=statistic)

    def _make_curvature(self, settings: LayerSettings, like: Tensor, *, bias: bool) -> Curvature | None:
        """Return the curvature that the settings ask for, with the device and dtype of `like`."""
        if not settings.rank:
            return None
        return make_curvature(
            settings.curvature,
            out_features=self.out_features,
            in_features=self.in_features,
            experts=self.count,
            rank=settings.rank,
            bias=bias,
        ).to(like.device, like.dtype)


class ExpertLinear(ExpertMap):
    """One matrix of a feed-forward layer as N experts and, where the protocol has one, a base expert.

    Parameters: `experts` [N, out, in], `base` [out, in], `expert_bias` [N, out], `base_bias` [out], `curvature`.
    Buffers, where the protocol has a statistic: `statistic` [N, out, in], `bias_statistic` [N, out].

    Args:
        weight: of the dense layer, copied into every expert and the base; [out, in].
        bias: of the dense layer; [out] or None.
        settings: of the model's expert layers.
        propagated: the base expert comes from the layer before, and none is stored.
    """

    statistic: Tensor | None
    bias_statistic: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, settings: LayerSettings, *, propagated: bool = False
    ) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), settings)
        n = settings.experts
        self.sparse = settings.top_k < n
        self.keep_vectors = settings.keep_vectors
        # a copied view would have its strides (GPT-2 stores [in, out]), unlike a saved and loaded one
        weight = weight.detach().contiguous()
        self.experts = nn.Parameter(weight.repeat(n, 1, 1))
        self.expert_bias = None if bias is None else nn.Parameter(bias.detach().repeat(n, 1))
        self.propagated, stored = propagated, settings.base and not propagated
        self.base = nn.Parameter(weight.clone()) if stored else None
        self.base_bias = nn.Parameter(bias.detach().clone()) if bias is not None and stored else None
        for name, parameter in (("statistic", self.experts), ("bias_statistic", self.expert_bias)):
            self.register_buffer(
                name,
                torch.zeros_like(parameter) if settings.rule.statistic and parameter is not None else None,
            )
        self.curvature = self._make_curvature(settings, weight, bias=bias is not None)

    def forward(
        self,
        x: Tensor,
        weights: Tensor,
        bases: BaseExperts | None = None,
        *,
        state: ForwardState | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Return x E_hat^T + b_hat; [G, L, out].

        Args:
            x: [G, L, in].
            weights: routing weights; [G, N] or [G, L, N].
            bases: the base expert, where it is propagated.
            state: of the forward pass: its micro-batch and its cache of parameters' results; None has neither.
            seed: of the protocol's multiplier in training, where it is random; None draws one from the process's
                generator, so that a run's seed and its checkpoints determine the mask.
        """
        bases = bases or self.stored_base
        product, seed = self._product(bases, state, seed)
        y = merged_linear(x, weights, product)
        bias = self.merged_bias(weights, bases, seed)
        return y if bias is None else y + bias.to(y.dtype)

    def forward_and_mean(
        self, x: Tensor, weights: Tensor, bases: BaseExperts, *, state: ForwardState | None = None
    ) -> tuple[Tensor, Means]:
        """Return the same, and the means over the experts of M_i tau_i: [out, in], and of the bias [out] or None."""
        product, seed = self._product(bases, state, None)
        y, mean = merged_linear_and_mean(x, weights, product)
        bias = self.merged_bias(weights, bases, seed)
        with torch.autocast(device_type=x.device.type, enabled=False):
            vectors = self.bias_vectors(bases)
        y = y if bias is None else y + bias.to(y.dtype)
        return y, Means(mean, None if vectors is None else vectors.mean(0))

    def means(self, bases: BaseExperts, state: ForwardState | None = None) -> Means:
        """Return the means alone."""
        x = self.experts.new_zeros(1, 1, self.in_features)
        return self.forward_and_mean(x, x.new_zeros(1, self.count), bases, state=state)[1]

    @torch.no_grad()
    def merged(
        self, weights: Tensor, bases: BaseExperts | None = None, cache: ParameterCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return E_hat [n, out, in] and b_hat [n, out] or None for routing weights [n, N], without a graph.

        The domain vectors are those of evaluation.
        """
        bases = bases or self.stored_base
        product = self.product(bases)
        cached = self._cached_vectors(product, 0, ForwardState(parameter_cache=cache))
        vectors = product.transform() if cached is None else cached.vectors  # [N, out, in]
        s, flat = weights.to(vectors.dtype), vectors.flatten(1)  # [n, N], [N, out * in]
        with torch.autocast(device_type=vectors.device.type, enabled=False):
            if product.base is None:
                mixed = self.alpha * (s @ flat)
            else:
                mixed = torch.addmm(product.base.flatten(), s, flat, alpha=self.alpha)
        bias = self.merged_bias(weights, bases)
        return mixed.view(-1, *vectors.shape[1:]), None if bias is None else bias.flatten(1)

    def product(self, bases: BaseExperts | None = None, seed: int = 0) -> MergedProduct:
        """Return the merged product of these experts, on their own base expert or another one."""
        weight = (bases or self.stored_base).weight
        return MergedProduct(
            self.experts,
            None if weight is None else weight.base,
            alpha=self.alpha,
            multiplier=self.multiplier(seed, self.statistic),
            factors=None if self.curvature is None else self.curvature.factors,
            sparse=self.sparse,
        )

    def _product(
        self, bases: BaseExperts, state: ForwardState | None, seed: int | None
    ) -> tuple[MergedProduct, int]:
        """Return the product of a forward pass, with cached domain vectors where there are any, and its seed."""
        if not (self.random and self.training):
            seed = 0
        elif seed is None:
            seed = int(torch.randint(2**62, ()).item())
        product = self.product(bases, seed)
        cached = None if state is None else self._cached_vectors(product, seed, state)
        if state is None or cached is None:
            return product, seed
        multiplier = product.multiplier and replace(product.multiplier, seed=cached.seed)
        last = state.micro_batch is None or state.micro_batch.last
        return replace(product, multiplier=multiplier, cached=cached, last=last), cached.seed

    def _cached_vectors(self, product: MergedProduct, seed: int, state: ForwardState) -> CachedVectors | None:
        """Return T where it is computed once for several calls, else None."""
        costs_nothing = product.base is None or (product.multiplier is None and product.factors is None)
        if not self.keep_vectors or self.sharded or costs_nothing:
            return None
        micro_batch, cache, grad = state.micro_batch, state.parameter_cache, torch.is_grad_enabled()
        if self.training:
            if micro_batch is None or product.by_rows or not grad:
                return None
            fixed = product.tensors[: -1 if self.propagated else None]  # the base expert is last
            return micro_batch.step.vectors(self, product, seed, fixed)
        if cache is None or (grad and any(t.requires_grad for t in product.tensors)):
            return None
        return cache.vectors(self, product)

    def expert(self, x: Tensor, i: int) -> Tensor:
        """Return x E_i^T + b_i, one expert alone; [m, in] -> [m, out]."""
        bias = None if self.expert_bias is None else self.expert_bias[i]
        return nn.functional.linear(x, self.experts[i], bias)

    @torch.no_grad()
    def observe(self, whole: Callable[[Tensor], Tensor] = Tensor.detach) -> None:
        """Update the protocol's statistic, where it has one, from the gradients of an optimizer step.

        `whole` gathers a sharded tensor; the statistic is not sharded. The gradient of T is that of the experts without
        the multiplier, which is above 0.
        """
        for parameter, statistic, base in (
            (self.experts, self.statistic, self.base),
            (self.expert_bias, self.bias_statistic, self.base_bias),
        ):
            if parameter is None or statistic is None or base is None or parameter.grad is None:
                continue
            gradient, rule = whole(parameter.grad), self.multiplier(0, statistic)
            multiplier = None if rule is None else rule(whole(parameter) - whole(base))
            updated = self.rule.update(statistic, gradient if multiplier is None else gradient / multiplier)
            statistic.copy_(torch.where(gradient.isfinite().all(), updated, statistic))
