"""Routing and curvature while training goes: sums on the device, read when a step is logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from camex_ft.moe.context import LayerRouting
from camex_ft.moe.curvature import Curvature, condition_number, distance_from_identity
from camex_ft.training.distributed import total, whole
from camex_ft.upcycling import expert_layers

ROUNDING = 1e-3  # more than rounding takes from a sum of weights


class RoutingMonitor:
    """Sums each layer's routing entropy and load over the steps between two log lines.

    Attributes:
        sums: since the last log line, by layer: entropy, number of groups, load; [2 + N].
        loads: share of the groups whose largest routing weight is each expert's, [N], by layer, at the last log line.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sums: dict[str, Tensor] = {}
        self.loads: dict[str, list[float]] = {}

    def check(self, sums: Any) -> None:
        """Raise `ValueError` unless `sums` are those of some of the model's layers."""
        layers = expert_layers(self.model)
        if not isinstance(sums, dict) or not sums.keys() <= layers.keys():
            raise ValueError(f"routing is {sums!r:.80}, expected tensors by layer")
        for name, held in sums.items():
            count = 2 + layers[name].settings.experts
            if not isinstance(held, Tensor) or held.shape != (count,):
                raise ValueError(f"routing of {name} is {held!r:.80}, expected {count} numbers")

    @torch.no_grad()
    def observe(self, layers: Mapping[str, LayerRouting]) -> None:
        """Add one step's routing."""
        for name, layer in layers.items():
            s = layer.weights.flatten(0, -2)  # [groups, N]
            keep = s.new_ones(len(s)) if layer.mask is None else layer.mask.flatten().to(s.dtype)
            p = scaled_to_one(s)
            entropy = -(torch.xlogy(p, p).sum(-1) * keep).sum()
            load = (nn.functional.one_hot(s.argmax(-1), s.shape[-1]) * keep.unsqueeze(-1)).sum(0)
            made = torch.cat([entropy.view(1), keep.sum().view(1), load])
            self.sums[name] = self.sums[name].to(made.device) + made if name in self.sums else made

    def summary(self) -> dict[str, float]:
        """Return and forget: entropy (nats, mean over layers), the largest share that one expert has of a layer's
        groups, and the largest distance of a curvature from the identity. Each layer's shares stay in `loads`.

        All are of the global batches, so that every process has to ask for them.
        """
        made: dict[str, float] = {}
        self.loads = {}
        if self.sums:
            device = next(iter(self.sums.values())).device  # a model may lie on several
            flat = torch.cat([sums.to(device) for sums in self.sums.values()])
            parts = total(flat).split([len(sums) for sums in self.sums.values()])
            entropies = torch.stack([part[0] / part[1].clamp_min(1) for part in parts])
            shares = [part[2:] / part[1].clamp_min(1) for part in parts]
            self.loads = {n: share.tolist() for n, share in zip(self.sums, shares, strict=True)}
            largest = max(max(shares) for shares in self.loads.values())
            made = {"routing_entropy": float(entropies.mean()), "routing_max_load": largest}
        distances = [d for layer in curvature_statistics(self.model).values() for d in layer["distance"]]
        if distances:
            made["curvature_distance"] = max(distances)
        self.sums = {}
        return made


def scaled_to_one(s: Tensor) -> Tensor:
    """Return routing weights [..., N] with the rows that sum to less than 1, as after a softmax over all, scaled."""
    total = s.sum(-1, keepdim=True)
    return s / torch.where((total > 0) & (total < 1 - ROUNDING), total, 1)


def curvature_statistics(model: nn.Module, *, condition: bool = False) -> dict[str, dict[str, list[float]]]:
    """Return, by layer, per expert: ``distance`` ||M - I||_F / ||I||_F and, if asked for and cheap, ``condition``.

    A layer's matrices are taken together: the mean over them of the distance, the largest of the condition numbers.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for name, layer in expert_layers(model).items():
        curvatures = [linear.curvature for linear in layer.linears.values()]
        given: list[Any] = [c.factors for c in curvatures if isinstance(c, Curvature)]
        factors = [type(f)(*[whole(tensor).detach() for tensor in f]) for f in given]
        if not factors:
            continue
        found[name] = {"distance": torch.stack([distance_from_identity(f) for f in factors]).mean(0).tolist()}
        conditions = [condition_number(f) for f in factors] if condition else []
        known = [c for c in conditions if c is not None]
        if known:
            found[name]["condition"] = torch.stack(known).amax(0).tolist()
    return found


def by_sequence(layer: LayerRouting) -> Tensor:
    """Return the mean routing weights of each sequence's groups; [B, N]."""
    weights = layer.weights
    if weights.dim() == 2:
        return weights
    if layer.mask is None:
        return weights.mean(1)
    keep = layer.mask.to(weights.dtype).unsqueeze(-1)  # [B, groups, 1]
    return (weights * keep).sum(1) / keep.sum(1).clamp_min(1)
