"""Which positions of T5's decoder are padding, under every way in which it gets its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from camex_ft.backbones.families.t5 import masks

Tiny = Callable[..., Any]
PAD, EOS = 0, 1  # as in conftest; T5's start token is its padding token
rows = st.lists(st.lists(st.integers(3, 39), max_size=6), min_size=1, max_size=4)


def padded(texts: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, texts))

    def fill(row: list[int]) -> list[int]:
        blank = [PAD] * (width - len(row))
        return blank + row if side == "left" else row + blank

    return torch.tensor([fill(text) for text in texts]), torch.tensor(
        [fill([1] * len(text)) for text in texts]
    )


@pytest.mark.parametrize("head", ["sequence-classification", "question-answering"])
@pytest.mark.parametrize("side", ["left", "right"])
@settings(max_examples=15, deadline=None)  # a model a time
@given(texts=rows)
def test_heads_that_shift_their_input(head: str, side: str, texts: list[list[int]], tiny: Tiny) -> None:
    """The decoder's real positions hold the start token and the row's tokens without its last, whatever the padding."""
    model = tiny("t5", head)
    texts = [[*text, EOS] for text in texts]
    ids, mask = padded(texts, side)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(len(texts), dtype=torch.long)}
    fed: list[Tensor] = []
    stack = model.get_decoder()
    handle = stack.register_forward_pre_hook(
        lambda _, __, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    handle.remove()
    decoder = masks(model, inputs)["decoder"]
    assert decoder is not None
    for text, shifted, real in zip(texts, fed[0], decoder, strict=True):
        assert shifted[real.bool()].tolist() == [PAD, *text[:-1]]


@pytest.mark.parametrize("given_input", [False, True], ids=["labels", "labels and decoder_input_ids"])
@pytest.mark.parametrize("pad", [-100, PAD])
def test_language_modelling_is_masked_by_its_labels(given_input: bool, pad: int, tiny: Tiny) -> None:
    model = tiny("t5", "seq2seq-lm")
    labels = torch.tensor([[5, 6, EOS], [7, EOS, pad]])
    inputs = {"attention_mask": torch.ones(2, 4), "labels": labels}
    if given_input:  # as a data collator makes it
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    found = masks(model, inputs)
    assert found["encoder"] is inputs["attention_mask"]
    assert found["decoder"] is not None
    assert found["decoder"].tolist() == [[True, True, True], [True, True, False]]


def test_the_callers_mask_comes_first(tiny: Tiny) -> None:
    own = torch.tensor([[1, 1, 0]])
    for head in ("base", "seq2seq-lm", "sequence-classification"):
        inputs = {
            "attention_mask": torch.ones(1, 3),
            "labels": torch.ones(1, 3),
            "decoder_attention_mask": own,
        }
        assert masks(tiny("t5", head), inputs)["decoder"] is own


def test_padding_of_a_given_decoder_input(tiny: Tiny) -> None:
    """The start token is a padding token, and real; with a cache the input is one new token."""
    inputs: dict[str, Any] = {"decoder_input_ids": torch.tensor([[PAD, 5, 6], [PAD, 7, PAD]])}
    found = masks(tiny("t5", "base"), inputs)["decoder"]
    assert found is not None
    assert found.tolist() == [[True, True, True], [True, True, False]]
    assert masks(tiny("t5", "base"), {**inputs, "past_key_values": object()})["decoder"] is None


def test_a_head_that_generates_may_have_generated_padding(tiny: Tiny) -> None:
    """Attention takes a padding token that was generated as any other, and with a cache nothing else is known of it."""
    inputs = {"decoder_input_ids": torch.tensor([[PAD, 5, PAD, 6]])}
    assert masks(tiny("t5", "seq2seq-lm"), inputs)["decoder"] is None


def test_generation_runs(tiny: Tiny) -> None:
    """The masks of every step of `generate` are for that step's tokens, or none."""
    model = tiny("t5", "seq2seq-lm")
    seen: list[tuple[Any, Any]] = []
    model.register_forward_pre_hook(
        lambda m, _, kwargs: seen.append((masks(m, kwargs)["decoder"], kwargs["decoder_input_ids"])),
        with_kwargs=True,
    )
    for cache in (False, True):
        model.generate(torch.tensor([[5, 6, EOS]]), max_new_tokens=4, use_cache=cache, do_sample=False)
    assert len(seen) >= 2
    assert all(mask is None or mask.shape == ids.shape for mask, ids in seen)


def test_a_ready_made_decoder_mask_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="decoder_attention_mask"):
        masks(tiny("t5", "seq2seq-lm"), {"decoder_attention_mask": torch.ones(1, 1, 3, 3)})
