"""What one matrix of a feed-forward layer needs as experts, whatever form its weights have: its bias and curvature.

b_hat = b_m + alpha * sum_i s_i keep_i * M_i (b_i - b_m)          biases are small, and are experts as they are
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from camex_ft.moe.chain import Bases, Carried
from camex_ft.moe.curvature import Curvature
from camex_ft.moe.settings import LayerSettings
from camex_ft.moe.vectors import Keep


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
