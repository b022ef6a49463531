"""One matrix as experts of low rank on a frozen base: domain vectors tau_i = c B_i A_i, c the scale.

    E_hat x = E_m x + alpha * sum_i s_i M_i tau_i x       M_i (B_i A_i) = B'_i A'_i, of [out, r'] and [r', in]

The curvature acts on the factors (`Factors.transform_pair`): r' = r for the kind low-rank, R r for the other two. With
all experts' factors side by side, two products follow, and neither tau nor E_hat is ever made:

    h = x A'^T [G, L, N r']        y = x E_m^T + (alpha c (s h)) B'^T

What is saved for the backward pass is x, h and s h, by plain autograd. B_i starts as 0, so that the function is the
dense layer's, and A_i at random, so that experts come to differ. With r = min(out, in) any experts can be had.

Source: LoRA, Hu et al. 2021 (arXiv 2106.09685), whose factors are the experts here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from camex_ft.moe.config import LayerSettings
from camex_ft.moe.context import ForwardState
from camex_ft.moe.layers.expert_linear import ExpertMap
from camex_ft.moe.merging.base_expert import BaseExperts
from camex_ft.moe.merging.caching import ParameterCache

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Experts of low rank: r, the scale c of B_i A_i, and the probability of dropout before A_i."""

    rank: int
    scale: float = 1.0
    dropout: float = 0.0


class LowRankLinear(ExpertMap):
    """One matrix of a feed-forward layer as N low-rank experts on a frozen base expert.

    Parameters: `expert_out` B [N, out, r], `expert_in` A [N, r, in], `expert_bias` [N, out] and `curvature`, in float32
    whatever the base is; `base` [out, in] and, where the protocol has a base expert, `base_bias` [out], which are not
    trained. Where the protocol has no base expert, there is the base too: experts are then E_i = base + tau_i.

    Args:
        weight: of the dense layer, the base, which shares its memory; [out, in].
        bias: of the dense layer; [out] or None.
        settings: of the model's expert layers.
        low_rank: of the experts.
    """

    base: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None, settings: LayerSettings, *, low_rank: LowRank
    ) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), settings)
        self.low_rank = low_rank
        n, r, (out, width) = settings.experts, low_rank.rank, weight.shape
        wide = torch.promote_types(weight.dtype, torch.float32)
        # the dense layer's own memory, if it is contiguous
        self.base = nn.Parameter(weight.detach().contiguous(), False)
        self.expert_out = nn.Parameter(weight.new_zeros(n, out, r, dtype=wide))
        self.expert_in = nn.Parameter(weight.new_empty(n, r, width, dtype=wide))
        self.expert_bias = None if bias is None else nn.Parameter(bias.detach().to(wide).repeat(n, 1))
        stored = bias is not None and settings.base
        self.base_bias = nn.Parameter(bias.detach().clone(), False) if stored and bias is not None else None
        self.bias_statistic = None
        self.curvature = self._make_curvature(settings, self.expert_out, bias=bias is not None)
        self.dropout = nn.Dropout(low_rank.dropout)
        # weights that sum to less than 1 scale the base with them, where no base stands by itself
        scaled = settings.router.normalise == "before" and settings.top_k < n
        self.shares_base = not settings.base and scaled
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start B_i as 0 and A_i uniform in +-1/sqrt(in), as a linear layer; nothing on the meta device."""
        if self.expert_in.is_meta:
            return
        self.expert_out.zero_()
        bound = self.in_features**-0.5
        self.expert_in.uniform_(-bound, bound)

    def forward(
        self,
        x: Tensor,
        weights: Tensor,
        bases: BaseExperts | None = None,
        *,
        state: ForwardState | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Return x E_hat^T + b_hat, in autocast's dtype or the base's; [G, L, out].

        Args:
            x: [G, L, in].
            weights: routing weights; [G, N] or [G, L, N].
            bases, state, seed: as of `ExpertLinear.forward`; only the cache of parameters' results is used.
        """
        left, right = self.factors(
            None if state is None else state.parameter_cache
        )  # B' [N, out, r'], A' [N, r', in]
        with torch.autocast(device_type=x.device.type, enabled=False):
            left = left.permute(1, 0, 2).flatten(1)  # [out, N r']
        x = x.to(self._dtype(x))
        s = (weights if weights.dim() == 3 else weights.unsqueeze(1)).to(x.dtype)  # [G, 1 or L, N]
        h = F.linear(self.dropout(x), right.flatten(0, 1).to(x.dtype))  # [G, L, N r']
        mixed = h.unflatten(-1, (self.count, -1)) * (self.alpha * self.low_rank.scale * s).unsqueeze(-1)
        y = F.linear(x, self.base)
        if self.shares_base:
            y = y * s.sum(-1, keepdim=True)
        y = y + F.linear(mixed.flatten(-2), left.to(x.dtype))
        bias = self.merged_bias(weights)
        return y if bias is None else y + bias.to(y.dtype)

    def expert(self, x: Tensor, i: int) -> Tensor:
        """Return x (base + c B_i A_i)^T + b_i, one expert by itself, without curvature; [m, in] -> [m, out]."""
        x = x.to(self._dtype(x))
        h = F.linear(self.dropout(x), self.expert_in[i].to(x.dtype))  # [m, r]
        bias = None if self.expert_bias is None else self.expert_bias[i].to(x.dtype)
        return F.linear(x, self.base, bias) + F.linear(
            self.low_rank.scale * h, self.expert_out[i].to(x.dtype)
        )

    def factors(self, cache: ParameterCache | None = None) -> Pair:
        """Return B' [N, out, r'] and A' [N, r', in], the curvature applied; cached in evaluation without gradients."""
        if self.curvature is None:
            return self.expert_out, self.expert_in
        if cache is None or self.training or self.sharded or torch.is_grad_enabled():
            return self._transform()
        sources = (self.expert_out, self.expert_in, *self.curvature.factors)
        return cache.get(self, sources, self._transform)

    @torch.no_grad()
    def vectors(self) -> Tensor:
        """Return the domain vectors c B_i A_i, as matrices; [N, out, in]."""
        return self.low_rank.scale * (self.expert_out @ self.expert_in)

    @torch.no_grad()
    def gram(self) -> Tensor:
        """Return <tau_i, tau_j> of the matrices without making them; [N, N], float64."""
        b, a = self.expert_out.double(), self.expert_in.double()
        left = torch.einsum("nor,mos->nmrs", b, b)  # B_i^T B_j
        right = torch.einsum("nri,msi->nmrs", a, a)  # A_i A_j^T
        return self.low_rank.scale**2 * (left * right).sum((-1, -2))

    @torch.no_grad()
    def merged(
        self, weights: Tensor, bases: BaseExperts | None = None, cache: ParameterCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return E_hat [n, out, in] and b_hat [n, out] or None for routing weights [n, N], without a graph."""
        with torch.autocast(device_type=weights.device.type, enabled=False):
            left, right = self.factors(cache)
            s = self.alpha * self.low_rank.scale * weights.to(left.dtype)  # [n, N]
            scaled = torch.einsum("gn,nor->gonr", s, left).flatten(2)  # [n, out, N r']
            base = self.base.to(left.dtype)
            if self.shares_base:
                base = base * weights.to(left.dtype).sum(-1)[:, None, None]
            merged = base + scaled @ right.flatten(0, 1)
        bias = self.merged_bias(weights)
        return merged, None if bias is None else bias.flatten(1)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"out={self.out_features}, in={self.in_features}, rank={self.low_rank.rank}"

    def _transform(self) -> Pair:
        assert self.curvature is not None
        with torch.autocast(device_type=self.expert_out.device.type, enabled=False):
            return self.curvature.factors.transform_pair(self.expert_out, self.expert_in)

    def _dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype of products with x: autocast's, else the base's."""
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.base.dtype
