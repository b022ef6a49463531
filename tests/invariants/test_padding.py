"""Invariant 2: padding, or longer neighbours, change no real token's output, no gradient, no balance loss."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from camex_ft.upcycling import routing_context
from tests.helpers.invariant_cases import Case, cases, dense, output, shake, upcycled
from tests.helpers.tiny import EOS, PAD, VOCABULARY

# float64: sums of a few dozen terms in another order
TOLERANCE = 1e-9
CASES = [
    c for c in cases("sequence-classification", "causal-lm", "seq2seq-lm", "base") if c.protocol != "dense"
]


@cache
def model_of(case: Case) -> PreTrainedModel:
    """Return the model of a case; shared, since no test here changes its parameters."""
    return shake(upcycled(case)).double()


def rows(*lengths: int) -> list[Tensor]:
    """Token ids of rows of these lengths, each ending in the end token; [length] each."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in lengths:
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        ids[-1] = EOS
        made.append(ids)
    return made


def batch(model: PreTrainedModel, ids: list[Tensor], length: int) -> dict[str, Tensor]:
    """Pad rows on the right to `length`; a decoder that is given its input gets the same rows and their mask."""
    padded = torch.full((len(ids), length), PAD)
    mask = torch.zeros_like(padded)
    for i, row in enumerate(ids):
        padded[i, : len(row)] = row
        mask[i, : len(row)] = 1
    inputs = {"input_ids": padded, "attention_mask": mask}
    if model.config.is_encoder_decoder and "Classification" not in type(model).__name__:
        inputs |= {"decoder_input_ids": padded.clone(), "decoder_attention_mask": mask.clone()}
    return inputs


def real(logits: Tensor, lengths: list[int]) -> Tensor:
    """Take the outputs of real tokens; the outputs of a head for sequences as they are."""
    if logits.dim() == 2:
        return logits
    return torch.cat([logits[i, :n] for i, n in enumerate(lengths)])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_more_padding_changes_nothing(case: Case) -> None:
    model = model_of(case)
    ids = rows(7, 5)
    seen = []
    for length in (7, 12):
        model.zero_grad()
        found = real(output(model, batch(model, ids, length)), [7, 5])
        context = routing_context(model)
        assert context is not None and context.last is not None
        balance = context.last.balance_loss()
        (found.square().sum() + balance).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        seen.append((found.detach(), balance.detach(), grads))
    (out, balance, grads), (padded, padded_balance, padded_grads) = seen
    torch.testing.assert_close(padded, out, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(padded_balance, balance, rtol=TOLERANCE, atol=TOLERANCE)
    for name, grad in grads.items():
        scale = float(grad.abs().max().clamp_min(1))
        torch.testing.assert_close(padded_grads[name], grad, rtol=0, atol=TOLERANCE * scale, msg=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_longer_neighbours_change_nothing(case: Case) -> None:
    model = model_of(case)
    short, long = rows(5, 11)
    with torch.no_grad():
        alone = real(output(model, batch(model, [short], 5)), [5])
        together = output(model, batch(model, [short, long], 11))[:1]
    torch.testing.assert_close(real(together, [5]), alone, rtol=TOLERANCE, atol=TOLERANCE)


LEFT = [c for c in CASES if c.head == "causal-lm"]


@pytest.mark.parametrize("case", LEFT, ids=str)
def test_left_padding_changes_nothing(case: Case) -> None:
    (ids,) = rows(7)
    padded = torch.cat([torch.full((4,), PAD), ids])
    mask = torch.cat([torch.zeros(4, dtype=torch.long), torch.ones(7, dtype=torch.long)])
    positions = torch.cat([torch.zeros(4, dtype=torch.long), torch.arange(7)])

    def run(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            whole = model(input_ids=ids[None], attention_mask=torch.ones(1, 7, dtype=torch.long)).logits
            left = model(
                input_ids=padded[None], attention_mask=mask[None], position_ids=positions[None]
            ).logits
        return whole, left[:, 4:]

    whole, left = run(copy.deepcopy(dense(case.model_type, case.head)).double())
    if not torch.allclose(whole, left, rtol=TOLERANCE, atol=TOLERANCE):
        pytest.skip("the dense model itself depends on left padding")
    whole, left = run(model_of(case))
    torch.testing.assert_close(left, whole, rtol=TOLERANCE, atol=TOLERANCE)
