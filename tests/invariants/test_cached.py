"""Invariant 4: with a key-value cache, logits are those of one full pass, wherever a prompt ends among segments."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from camex_ft.upcycling import cached
from tests.helpers.invariant_cases import SEGMENT, Case, causal_cases, mixture_cases, shake, upcycled
from tests.helpers.tiny import PAD, VOCABULARY

# float64: the same sums in another order, through three layers
TOLERANCE = 1e-9
T = SEGMENT
PROMPTS = sorted({1, 2, T - 1, T, T + 1, 2 * T, 2 * T + 3})
NEW = 2 * T + 2
CAUSAL, MIXTURES = causal_cases(), mixture_cases()


@cache
def model_of(case: Case) -> PreTrainedModel:
    """Return the model of a case; shared, since no test here changes it."""
    made = shake(upcycled(case)).double()
    made.generation_config.eos_token_id = None  # so that all rows go on to the end
    return made


def draw(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(6))


def arguments(model: PreTrainedModel, ids: Tensor, mask: Tensor, seen: int) -> dict[str, Any]:
    """Return a call's inputs for positions `seen` and later of rows `ids`, whose padding is on the left."""
    if model.config.is_encoder_decoder:
        source = draw(len(ids), 5)
        return {"input_ids": source, "decoder_input_ids": ids[:, seen:], "decoder_attention_mask": mask}
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, seen:]
    return {"input_ids": ids[:, seen:], "attention_mask": mask, "position_ids": positions}


def full(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**arguments(model, ids, mask, 0), use_cache=False).logits


def in_pieces(model: PreTrainedModel, ids: Tensor, mask: Tensor, lengths: list[int]) -> Tensor:
    """Return the logits of one pass after the other over pieces of these lengths, each going on from the cache."""
    logits, cache, seen = [], None, 0
    with torch.no_grad():
        for length in lengths:
            end = seen + length
            made = model(
                **arguments(model, ids[:, :end], mask[:, :end], seen), past_key_values=cache, use_cache=True
            )
            logits.append(made.logits)
            cache, seen = made.past_key_values, end
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_prompts_of_any_length_and_then_token_by_token(case: Case) -> None:
    model = model_of(case)
    for prompt in PROMPTS:
        ids = draw(2, prompt + NEW)
        mask = torch.ones_like(ids)
        with cached(model):  # as `generate` does; the next test goes without
            found = in_pieces(model, ids, mask, [prompt] + [1] * NEW)
        torch.testing.assert_close(found, full(model, ids, mask), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("case", [*CAUSAL, *MIXTURES], ids=str)
def test_rows_of_unequal_length_padded_on_the_left(case: Case) -> None:
    model = model_of(case)
    # the rotary positions of DeepSeek-V2 are applied in float32, whatever comes in
    tolerance = 1e-6 if case.model_type == "deepseek_v2" else TOLERANCE
    longest = max(PROMPTS)
    ids, mask = draw(len(PROMPTS), longest + NEW), torch.ones(len(PROMPTS), longest + NEW, dtype=torch.long)
    for row, length in enumerate(PROMPTS):
        ids[row, : longest - length], mask[row, : longest - length] = PAD, 0
    expected = full(model, ids, mask)
    for pieces in ([longest] + [1] * NEW, [longest - 4, 4, 2, 5, NEW - 7]):
        found = in_pieces(model, ids, mask, pieces)
        for row, length in enumerate(PROMPTS):
            start = longest - length
            torch.testing.assert_close(
                found[row, start:], expected[row, start:], rtol=tolerance, atol=tolerance
            )


def prompts(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return prompts of all lengths in one batch, as a tokenizer with padding on the left makes it."""
    rows, longest = len(PROMPTS), max(PROMPTS)
    ids, mask = draw(rows, longest), torch.ones(rows, longest, dtype=torch.long)
    for row, length in enumerate(PROMPTS):
        ids[row, : longest - length], mask[row, : longest - length] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 10},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_generation_is_the_same_with_and_without_a_cache(case: Case, way: str) -> None:
    model = model_of(case)
    made = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        made.append(
            model.generate(
                **prompts(model),
                **WAYS[way],
                max_new_tokens=NEW,
                use_cache=use_cache,
                output_logits=True,
                return_dict_in_generate=True,
            )
        )
    with_cache, without = made
    assert torch.equal(with_cache.sequences, without.sequences)
    for ours, expected in zip(with_cache.logits, without.logits, strict=True):
        torch.testing.assert_close(ours, expected, rtol=TOLERANCE, atol=TOLERANCE)


SINGLE = [c for c in CAUSAL if c.protocol in ("ties-ca", "smoe") and c.granularity == "auto"]


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_a_prompt_goes_on_alone_as_among_others(case: Case, num_beams: int) -> None:
    model = model_of(case)
    batch = prompts(model)
    if model.config.is_encoder_decoder:
        batch = {k: v.flip(1) for k, v in batch.items()}  # relative positions: padding belongs to the right
    settings = {"max_new_tokens": NEW, "num_beams": num_beams, "do_sample": False, "use_cache": True}
    together = model.generate(**batch, **settings)[:, -NEW:]
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = model.generate(batch["input_ids"][row, mask][None], **settings)[:, -NEW:]
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_in_float32(case: Case) -> None:
    model = shake(upcycled(case))
    ids = draw(2, 2 * T + 3 + NEW)
    mask = torch.ones_like(ids)
    found, expected = in_pieces(model, ids, mask, [2 * T + 3] + [1] * NEW), full(model, ids, mask)
    # the design's bound, on logits that the tiny models' large random weights may make large
    scale = float(expected.abs().max().clamp_min(1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale)
