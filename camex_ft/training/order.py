"""The order of training rows."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


class EpochSampler(Sampler[int]):
    """A length-grouped sampler whose order follows from seed and epoch alone, so that a resumed run finds it again."""

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Any:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)


def set_epoch(dataloader: Any, epoch: int) -> None:
    """Choose the order of an epoch for all samplers that a data loader was made of, however they are wrapped.

    Of several processes, one that goes on in the middle of an epoch has a wrapper more, which passes no epoch on:
    the rows would be those of the first epoch.
    """
    seen: list[Any] = [dataloader]
    for each in seen:
        for name in ("batch_sampler", "sampler"):
            inner = getattr(each, name, None)
            if inner is not None and not any(inner is other for other in seen):
                seen.append(inner)
        if each is not dataloader and hasattr(each, "set_epoch"):
            each.set_epoch(epoch)
