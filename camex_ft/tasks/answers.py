"""Answers as text: generated, given a probability, and chosen among the windows of a context.

The score of an answer is log p(answer | window), the sum over its tokens and the end token. A sum and not a mean: it is
the logarithm of a probability, and so comparable between windows, between answers of different lengths, and with that
of `NO_ANSWER`. A mean would favour long answers, whose later tokens are mostly certain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NO_ANSWER = "no answer"  # what the model is to say of a window without the answer
IGNORED = -100
INPUTS = ("input_ids", "attention_mask")


def target(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    """Return the tokens of `text` with the end token, at most `length`: a longer text loses its last tokens, not it."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids[: length - 1], int(tokenizer.eos_token_id)]


def repeated(ids: Sequence[int], inputs: Mapping[str, Tensor]) -> Tensor:
    """Return labels [B, L] that are `ids` for every row of a batch."""
    first = inputs["input_ids"]
    return torch.tensor(ids, device=first.device).repeat(len(first), 1)


def log_probabilities(model: PreTrainedModel, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Return log p(labels | input) of every row, the sum over its tokens, under teacher forcing; [B], float32.

    Args:
        model: an encoder-decoder model.
        inputs: of a batch; `INPUTS` are read.
        labels: tokens with the end token; [B, L], -100 where there is none.
    """
    logits = model(**only_inputs(inputs), labels=labels).logits
    return row_log_probabilities(logits, labels)


def row_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of log p over the tokens of each row. logits: [B, L, V]; labels: [B, L]; result: [B], float32."""
    counted = labels != IGNORED
    chosen = logits.float().log_softmax(-1).gather(-1, labels.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    return (chosen * counted).sum(-1)


def generate(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    beams: int,
) -> Tensor:
    """Return the generated answers as labels: tokens with the end token, then -100; [B, L], L at most `length`.

    Greedy, or the best of `beams`. An answer that has not ended after `length` - 1 tokens is ended there, so that its
    probability is that of a whole answer. What a checkpoint's own generation settings say beside token ids has no part.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    settings = GenerationConfig(
        max_new_tokens=length,
        num_beams=beams,
        do_sample=False,
        use_cache=True,
        forced_eos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=own.decoder_start_token_id if own is not None else None,
    )
    made: Any = model.generate(**only_inputs(inputs), generation_config=settings)  # type: ignore[operator]
    ids: Tensor = made[:, 1:]  # without the start token
    ended = (ids == tokenizer.eos_token_id).cumsum(-1) - (ids == tokenizer.eos_token_id).long()
    return ids.masked_fill(ended > 0, IGNORED)


def only_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the encoder reads."""
    return {name: inputs[name] for name in INPUTS if name in inputs}


def as_bytes(texts: Sequence[str]) -> Tensor:
    """Return texts in UTF-8, a row each, with -100 behind; int64, [B, greatest number of bytes, at least 1]."""
    rows = [list(text.encode()) for text in texts]
    width = max([1, *map(len, rows)])
    return torch.tensor([row + [IGNORED] * (width - len(row)) for row in rows], dtype=torch.int64)


def as_texts(rows: np.ndarray) -> list[str]:
    """Return the texts that `as_bytes` made `rows` of."""
    return [bytes(row[row >= 0].astype(np.uint8).tolist()).decode() for row in rows]


def spoken(text: str) -> str:
    """Return an answer as it is written, without blanks around it; the empty text where it is `NO_ANSWER`."""
    return "" if " ".join(text.split()) == NO_ANSWER else text.strip()


def choose(
    texts: Sequence[str],
    scores: np.ndarray,
    origin: np.ndarray,
    count: int,
    *,
    none_scores: np.ndarray | None = None,
) -> list[str]:
    """Return the answer of each example, from those of its windows; the empty text is no answer.

    Of the windows that give an answer the one with the greatest score wins, the first one among equals. With
    `none_scores` there is no answer where its score is greater still. The score of no answer for an example is the
    least one of its windows: it has none only if no window has one, and the window that doubts most decides.

    Args:
        texts: the answer of each window, as `spoken` returns it.
        scores: its log-probability; [windows].
        origin: the example that each window belongs to; [windows].
        count: number of examples.
        none_scores: log-probability of `NO_ANSWER` in each window; None where every question has an answer.
    """
    best = np.full(count, -np.inf)
    least = np.full(count, np.inf)
    chosen = [""] * count
    for window, (text, row) in enumerate(zip(texts, origin, strict=True)):
        if none_scores is not None:
            least[row] = min(least[row], none_scores[window])
        if text and (scores[window] > best[row] or not chosen[row]):
            best[row], chosen[row] = scores[window], text
    if none_scores is None:
        return chosen
    return ["" if none > given else text for text, none, given in zip(chosen, least, best, strict=True)]
