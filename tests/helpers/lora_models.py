"""Tiny models of every family with low-rank experts, for the tests of ``tuning.mode: lora`` and of adapters."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from camex_ft.config.rules import not_low_rank
from camex_ft.upcycling import upcycle
from camex_ft.utils.registry import BACKBONES, PROTOCOLS
from tests.helpers.invariant_cases import dense
from tests.helpers.tiny import family_names

CLASSIFIER = "sequence-classification"
FAMILIES = {name: BACKBONES.get(name).model_types for name in family_names()}
FIRST = [types[0] for types in FAMILIES.values()]
SOME = ["dense", "domain-ca"]
ABLE = [name for name in PROTOCOLS.names() if not not_low_rank(PROTOCOLS.get(name))]
LORA = {"mode": "lora", "lora": {"rank": 2}}
HEADS = {"gpt2": "causal-lm", "llama": "causal-lm", "t5": "seq2seq-lm"}


def lora(
    model_type: str = "bert", head: str = CLASSIFIER, protocol: str = "domain-ca", **sections: Any
) -> PreTrainedModel:
    merging = {"protocol": protocol, "experts": 3, "curvature": {"rank": 2}}
    given = {"merging": merging, "routing": {"segment": 3}, "tuning": LORA, **sections}
    return upcycle(dense(model_type, head), **given).eval()


@torch.no_grad()
def train(model: PreTrainedModel, scale: float = 0.2) -> PreTrainedModel:
    """Move what is trained, as training would."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model
