"""Every kind of curvature in a whole model: function preserved, saved and loaded, with padding and a cache, trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from camex_ft.moe.curvature import KINDS, Curvature
from camex_ft.training.callbacks.monitoring import curvature_statistics
from camex_ft.upcycling import load, routing_context, upcycle
from tests.helpers.invariant_cases import Case, dense, shake, upcycled
from tests.helpers.tiny import PAD, VOCABULARY, inputs_of

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


@every_kind
@pytest.mark.parametrize("protocol", ["ties-ca", "ep-camex"])
def test_under_autocast_domain_vectors_stay_in_float32(kind: str, protocol: str) -> None:
    """Made once for two micro-batches, and kept for evaluation, they are those that every call makes for itself."""
    found = []
    for keeps in (False, True):
        given = {
            "curvature": {"kind": kind, "rank": 3},
            "protocol": protocol,
            "experts": 3,
            "keep_vectors": keeps,
        }
        made = shake(
            upcycle(dense("gpt2", "causal-lm"), merging=given, routing={"segment": 3, "noise": False}), 0.05
        )
        made.train()
        for module in made.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        inputs, context = inputs_of(made, "causal-lm"), routing_context(made)
        assert context is not None
        for last in (False, True):
            with context.micro_batch(last=last), torch.autocast("cpu", dtype=torch.bfloat16):
                loss = made(**inputs).logits.float().square().mean()
                loss.backward()
        gradients = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            evaluated = made.eval()(**inputs).logits
            generated = made.generate(inputs["input_ids"][:1], max_new_tokens=5, do_sample=False)
        found.append((gradients, evaluated, generated))
    (apart, one, text), (shared, other, same) = found
    # bfloat16 products of the same float32 weights, but for the order of float32 sums before they are rounded
    torch.testing.assert_close(other, one, rtol=2e-2, atol=2e-2 * float(one.abs().max()))
    for name, gradient in apart.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            shared[name], gradient, rtol=0, atol=2e-2 * scale, msg=lambda m, n=name: n + m
        )
    assert text.shape == same.shape
