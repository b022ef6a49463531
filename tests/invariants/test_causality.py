"""Invariant 3: in every causal stack, changing token t changes no logit before t."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from camex_ft.upcycling import upcycle
from tests.helpers.invariant_cases import SEGMENT, Case, causal_cases, dense, mixture_cases, shake, upcycled
from tests.helpers.tiny import VOCABULARY

# float64: the changed rows are other rows of one batch, whose products may round differently
TOLERANCE = 1e-9
LENGTH = 2 * SEGMENT + 3
CAUSAL = causal_cases()


def changed_rows(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return token ids [L + 1, L], row t + 1 of which has another token t than row 0, and their logits."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, VOCABULARY, (LENGTH,), generator=generator).repeat(LENGTH + 1, 1)
    for t in range(LENGTH):
        ids[t + 1, t] = 3 + (ids[t + 1, t] - 2) % (VOCABULARY - 3)
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        source = torch.randint(3, VOCABULARY, (1, 5), generator=generator).repeat(LENGTH + 1, 1)
        inputs = {"input_ids": source, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    with torch.no_grad():
        return ids, model(**inputs).logits


def leaks(logits: Tensor) -> list[tuple[int, int]]:
    """Return (t, u) of every logit u < t that token t changes; fails where a change of t changes nothing at all."""
    found = []
    for t in range(LENGTH):
        moved = (logits[t + 1] - logits[0]).abs().amax(-1)  # [L]
        assert moved[t] > 1e-6, f"token {t} has no effect: the test would see no leak"
        found += [(t, u) for u in range(t) if moved[u] > TOLERANCE]
    return found


@pytest.mark.parametrize("case", [*CAUSAL, *mixture_cases()], ids=str)
def test_no_logit_depends_on_a_later_token(case: Case) -> None:
    _, logits = changed_rows(shake(upcycled(case)).double())
    assert leaks(logits) == []


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_the_test_finds_a_leak(model_type: str) -> None:
    """As the paper does it, a first segment is routed by itself: tokens see their segment's future."""
    made = upcycle(
        dense(model_type, "causal-lm"),
        merging={"protocol": "domain-ca", "experts": 3, "curvature": {"rank": 2}},
        routing={"segment": SEGMENT, "first_segment": "self"},
    )
    _, logits = changed_rows(shake(made.eval()).double())
    assert leaks(logits) == [(t, u) for t in range(SEGMENT) for u in range(t)]
