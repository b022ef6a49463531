"""Mean routing: what routing weights are on the average over some rows, and how much of them depends on the row.

    s_bar = mean over groups g of s_g                              [N]
    H     = mean over groups of -sum_i s_gi log s_gi               nats, from 0 to log N
    I     = H(s_bar) - H                                           nats, what is lost where s_bar serves every group

A group is what shares routing weights: a sequence, a segment or a token. I is the Jensen-Shannon divergence of the
groups' routing weights, the information that they have of which group it is: 0 where all are routed alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from camex_ft.moe.context import LayerRouting
from camex_ft.training.monitor import scaled_to_one
from camex_ft.training.trainer import CamexTrainer
from camex_ft.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MeanRouting:
    """The routing of some rows, by layer.

    Attributes:
        weights: s_bar; [N], float64.
        entropy: H, in nats.
        lost: I, in nats.
    """

    weights: Mapping[str, Tensor]
    entropy: Mapping[str, float]
    lost: Mapping[str, float]


class _Sums:
    """Of one layer: the sum of the weights [N] and of their entropies, and the number of groups."""

    def __init__(self) -> None:
        self.weights: Tensor | float = 0.0
        self.entropy = self.groups = 0.0

    def add(self, routing: LayerRouting) -> None:
        s = routing.weights.detach().double().flatten(0, -2).cpu()  # [groups, N]
        keep = s.new_ones(len(s)) if routing.mask is None else routing.mask.flatten().to(s)
        self.weights = self.weights + (s * keep.unsqueeze(-1)).sum(0)
        self.entropy += float((entropy(s) * keep).sum())
        self.groups += float(keep.sum())


def entropy(s: Tensor) -> Tensor:
    """Return the entropy in nats of routing weights [..., N], scaled to a sum of 1; [...]."""
    p = scaled_to_one(s)
    return -torch.xlogy(p, p).sum(-1)


@torch.no_grad()
def mean_routing(trainer: CamexTrainer, rows: Dataset) -> MeanRouting:
    """Return the mean routing of a trainer's model over encoded rows, one forward pass each, in evaluation mode.

    Raises:
        UserError: an encoder-decoder's rows have no labels, which its decoder is run on.
    """
    sums: dict[str, _Sums] = {}
    model = cast(PreTrainedModel, trainer.model).eval()
    assert trainer.context is not None, "a model without experts has no routing"
    with trainer.context.cached():
        for inputs in batches(trainer, model, rows):
            with trainer.compute_loss_context_manager():
                model(**inputs)
            assert trainer.context.last is not None
            for name, routing in trainer.context.last.layers.items():
                sums.setdefault(name, _Sums()).add(routing)
    weights = {name: each.weights / each.groups for name, each in sums.items()}
    inner = {name: each.entropy / each.groups for name, each in sums.items()}
    return MeanRouting(
        weights=cast(Mapping[str, Tensor], weights),
        entropy=inner,
        # rounding alone makes it negative: entropy is concave
        lost={n: max(float(entropy(cast(Tensor, w))) - inner[n], 0.0) for n, w in weights.items()},
    )


def batches(trainer: CamexTrainer, model: PreTrainedModel, rows: Dataset) -> Iterator[dict[str, Any]]:
    """Yield what a model's forward pass takes of every batch of encoded rows, on its device.

    Raises:
        UserError: an encoder-decoder's rows have no labels, which its decoder is run on.
    """
    known = inspect.signature(model.forward).parameters
    for batch in trainer.get_eval_dataloader(rows):
        moved = {
            k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items() if k in known
        }
        if model.config.is_encoder_decoder and "labels" not in moved and model.can_generate():
            raise UserError(
                "the rows of this split have no answers, which the decoder is run on: expected --split train"
            )
        yield {**moved, **trainer.without_cache}
