"""Every kind of curvature in a whole model: function preserved, saved and loaded, with padding and a cache, trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import Case, dense, shake, upcycled
from tiny import PAD, VOCABULARY, inputs_of
from torch import Tensor
from transformers import PreTrainedModel

from camex_ft.moe.curvature import KINDS, Curvature
from camex_ft.training.monitor import curvature_statistics
from camex_ft.upcycling import load

CASE = Case("gpt2", "causal-lm", "ties-ca", "auto")
TOLERANCE = 1e-9  # float64: the same sums in another order, through three layers
every_kind = pytest.mark.parametrize("kind", KINDS)


def model(kind: str) -> PreTrainedModel:
    return upcycled(CASE, curvature={"kind": kind, "rank": 3})


@every_kind
def test_the_function_is_preserved(kind: str) -> None:
    made, plain = model(kind), dense("gpt2", "causal-lm")
    assert {m.kind for m in made.modules() if isinstance(m, Curvature)} == {kind}
    inputs = inputs_of(made, "causal-lm")
    torch.testing.assert_close(made(**inputs).logits, plain(**inputs).logits, rtol=0, atol=1e-5)


@every_kind
@torch.no_grad()
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    made = shake(model(kind))
    made.save_pretrained(tmp_path)
    again = load(tmp_path)
    inputs = inputs_of(made, "causal-lm")
    assert torch.equal(again(**inputs).logits, made(**inputs).logits)
    assert curvature_statistics(again, condition=True) == curvature_statistics(made, condition=True)


@every_kind
@torch.no_grad()
def test_padding_and_a_cache_change_nothing(kind: str) -> None:
    made = shake(model(kind)).double()
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    expected: Tensor = made(input_ids=ids, use_cache=False).logits
    padded = torch.cat([torch.full((2, 4), PAD), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 4, dtype=torch.long), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, found = None, []
    for start, stop in ((0, 8), (8, 9), (9, 13)):
        some = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        step = made(input_ids=padded[:, start:stop], past_key_values=cache, use_cache=True, **some)
        cache = step.past_key_values
        found.append(step.logits)
    torch.testing.assert_close(torch.cat(found, dim=1)[:, 4:], expected, rtol=TOLERANCE, atol=TOLERANCE)


@every_kind
def test_one_training_step_reaches_all_factors(kind: str) -> None:
    made = shake(model(kind), 0.1).train()
    inputs = inputs_of(made, "causal-lm")
    made(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = {n: p.grad for n, p in made.named_parameters() if ".curvature." in n}
    assert gradients and all(g is not None and g.isfinite().all() and g.any() for g in gradients.values())
