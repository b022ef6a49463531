"""Language modelling: WikiText-2 and WikiText-103 (Merity et al. 2016, arXiv 1609.07843), and any text.

A split is one stream of text and of its tokens. Training reads it in blocks, evaluation in overlapping windows, so that
each token is scored once, with context before it.

    rows        "= Title =\\n"  ""  "One line .\\n"  ...      lines or whole documents
    text        "= Title =\\n\\nOne line .\\n"               each row ends in a line feed, a blank row is a line feed
    blocks      [0, B) [B, 2B) [2B, 3B) ...                training
    windows     [0, B) [S, B + S) [2S, B + 2S) ...         evaluation: each scores the tokens after the one before

    perplexity       exp(nll / scored tokens)     depends on the tokenizer
    word_perplexity  exp(nll / words)             words are separated by blanks; does not depend on the tokenizer
    bits_per_byte    nll / (ln 2 * bytes)         bytes of the text in UTF-8; does not depend on the tokenizer
    loss             nll / scored tokens          in nats

nll is the sum of -ln p over the scored tokens: all but the first one, which has no context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from camex_ft.config.schema import TaskConfig
from camex_ft.config.values import Count
from camex_ft.tasks.base import IGNORED, Collator, Predictions, Task
from camex_ft.utils.errors import UserError
from camex_ft.utils.features import build_features
from camex_ft.utils.registry import TASKS

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from camex_ft.tasks.metrics import Scores

CHUNK = 2**21  # characters that are tokenised as one text; longer ones are cut after a line
TOGETHER = 8  # chunks that are tokenised at the same time, on several cores
ENCODED = {"input_ids": ["int32"], "context": "int32"}


class LanguageModellingConfig(TaskConfig):
    """A split is one stream of tokens, read in blocks and windows."""

    kind = "language modelling"
    lengths = ("block_size",)

    block_size: Count = Field(
        default=1024, description="Tokens of a training block and of an evaluation window."
    )
    stride: Count | None = Field(
        default=None,
        description="Tokens that an evaluation window scores, the rest of it being context; null: half of "
        "`block_size`.",
    )

    @property
    def step(self) -> int:
        """Tokens from one evaluation window to the next: `stride`, or half of `block_size`."""
        return self.stride or max(self.block_size // 2, 1)

    @property
    def summary(self) -> str:
        """The length of a block in words."""
        return f"blocks of {self.block_size} tokens"

    def problems(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield the sizes in which no token can be predicted from others."""
        if self.block_size < 2:
            yield ("block_size",), "expected at least 2: a token is predicted from those before it"
        elif self.step >= self.block_size:
            yield (
                ("stride", "block_size"),
                f"expected less than task.block_size, which is {self.block_size}, got {self.stride}: a token that a "
                "window scores needs one before it",
            )

    def implied(self) -> dict[str, Any]:
        """Return the stride that null stands for."""
        return {"stride": self.step}


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModelling(Task[LanguageModellingConfig]):
    """A text whose tokens are predicted from those before them."""

    head: ClassVar[str] = "causal-lm"
    config_class: ClassVar[type[TaskConfig]] = LanguageModellingConfig
    plain_text: ClassVar[bool] = True

    primary: str = "perplexity"
    greater_is_better: bool = False

    def check_split(self, dataset: Dataset, split: str) -> None:
        """Raise `UserError` for a split of blanks alone."""
        if not any(map(str.strip, dataset["text"][:])):
            raise UserError(
                f"{self.id}: the {split} split holds no text in its {len(dataset)} rows; expected at least one word"
            )

    def rows(self, dataset: Dataset, split: str) -> Dataset:
        """Return the lines or documents, with the column ``text`` alone, since a block may hold several."""
        return dataset.select_columns(["text"])

    def encode(
        self, rows: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, settings: LanguageModellingConfig
    ) -> Dataset:
        """Return the blocks of the train split, or the windows of another: ``input_ids``, and ``context``, the number
        of leading tokens that are not scored.

        Raises:
            UserError: the split is shorter than two tokens.
        """
        from datasets import Dataset

        ids = stream_tokens(stream_text(rows["text"][:]), tokenizer)
        if len(ids) < 2:
            raise UserError(
                f"{self.id}: the {split} split has {len(ids)} token: expected at least 2, as a token is predicted from "
                "those before it"
            )
        if split == self.splits["train"]:
            ranges = blocks(len(ids), settings.block_size)
        else:
            ranges = windows(len(ids), settings.block_size, settings.step)
        columns = {
            "input_ids": [ids[w.start : w.end] for w in ranges],
            "context": [w.context for w in ranges],
        }
        return Dataset.from_dict(columns, features=build_features(ENCODED))

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """Return the collator, whose labels are the tokens without context and padding."""
        return collate

    def outputs(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        tokenizer: PreTrainedTokenizerBase,
        settings: LanguageModellingConfig,
    ) -> tuple[None, tuple[Tensor, Tensor]]:
        """Return, by window, the sum of -ln p over its scored tokens (float32) and their number; [B] each."""
        import torch
        from torch.nn import functional as F

        labels = inputs["labels"][:, 1:]
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        # one window at a time: in float32 the logits of a whole batch may take more memory than the model
        nll = [
            F.cross_entropy(x[:-1].float(), y, reduction="sum") for x, y in zip(logits, labels, strict=True)
        ]
        return None, (torch.stack(nll), (labels != IGNORED).sum(1))

    def metrics(self, outputs: Any, rows: Dataset, origin: np.ndarray | None = None) -> Scores:
        """Return perplexity, word_perplexity, bits_per_byte and loss; infinite if they exceed a float."""
        nll, tokens = (float(np.asarray(each, dtype=np.float64).sum()) for each in outputs)
        text = stream_text(rows["text"][:])
        words, size = len(text.split()), len(text.encode())
        return {
            "perplexity": exp(nll / tokens),
            "word_perplexity": exp(nll / words),
            "bits_per_byte": nll / (math.log(2) * size),
            "loss": nll / tokens,
        }

    def predict(self, outputs: Any, rows: Dataset, origin: np.ndarray | None = None) -> Predictions:
        """Raise `UserError`, since a language model has no decisions on a text."""
        raise self.no_predictions()

    def labelled(self, rows: Dataset) -> bool:
        """Return True: a text is its own label."""
        return True

    def no_predictions(self) -> UserError:
        """Return the error for predictions, with the commands for perplexity and generation."""
        return UserError(
            f"{self.id} has nothing to predict: `camex-ft evaluate RUN` measures the perplexity, and "
            '`camex-ft generate RUN "a beginning"` goes on from a text'
        )


class TokenRange(NamedTuple):
    """Tokens [start, end) of a stream, of which the first `context` are not scored."""

    start: int
    end: int
    context: int


def stream_line(row: str) -> str:
    """Return a row of the data as a line of the stream, the same for the hub's rows and the lines of the raw file."""
    return f"{row.removesuffix(chr(10))}\n" if row.strip() else "\n"


def stream_text(rows: Iterable[str]) -> str:
    """Join `rows` to a stream of text."""
    return "".join(map(stream_line, rows))


def chunks(stream: str, size: int = CHUNK) -> Iterator[str]:
    """Split `stream` into pieces of at least `size` characters that end a line, except for the last one."""
    start = 0
    while start < len(stream):
        end = stream.find("\n", start + size - 1) + 1 or len(stream)
        yield stream[start:end]
        start = end


def stream_tokens(stream: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the token ids of `stream`; [n], int32.

    No special token is added, except for a begin token before the first one if the tokenizer begins texts with it, as
    Llama's does and GPT-2's does not. The text is never read as special tokens.
    """
    parts = [np.asarray(begin_tokens(tokenizer), dtype=np.int32)]
    pieces = list(chunks(stream))
    for start in range(0, len(pieces), TOGETHER):
        ids = tokenizer(
            pieces[start : start + TOGETHER],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        parts += [np.asarray(piece, dtype=np.int32) for piece in ids]
    return np.concatenate(parts)


def begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a list of the begin token if the tokenizer begins texts with it, else an empty list."""
    first = tokenizer("a")["input_ids"][:1]
    return list(first) if first and first == [tokenizer.bos_token_id] else []


def blocks(length: int, size: int) -> list[TokenRange]:
    """Return consecutive blocks of `size` tokens; a shorter last one is left out, unless it is the only one."""
    whole = [TokenRange(start, start + size, 0) for start in range(0, length - size + 1, size)]
    return whole or [TokenRange(0, length, 0)]


def windows(length: int, size: int, step: int) -> list[TokenRange]:
    """Return windows of `size` tokens (one of `length`, if that is less) that score each token but the first once.

    Every window but the first scores `step` tokens after as many others as it has room for; the last one scores the
    rest.

    Args:
        length: tokens of the stream.
        size: tokens of a window.
        step: tokens that a window scores; at least 1 and less than `size`, as a token needs one before it.
    """
    if not 1 <= step < size:
        raise ValueError(f"windows of {size} tokens can't step by {step}")
    ranges = [TokenRange(0, min(size, length), 1)]
    while (done := ranges[-1].end) < length:
        end = min(done + step, length)
        ranges.append(TokenRange(end - size, end, done - (end - size)))
    return ranges


def exp(value: float) -> float:
    """Return e to the power of `value`, or infinity if that exceeds a float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and labels of a batch, [B, L]; shorter rows are padded on the right with 0."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence(
        [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows], batch_first=True
    )
    lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
    contexts = torch.tensor([[row["context"]] for row in rows])
    position = torch.arange(ids.shape[1])
    real = position < lengths
    labels = ids.where(real & (position >= contexts), IGNORED)
    return {"input_ids": ids, "attention_mask": real.long(), "labels": labels}


def lm(name: str, benchmark_name: str, summary: str, **attributes: Any) -> None:
    """Register a task of language modelling."""
    entry = LanguageModelling(
        suite="lm",
        name=name,
        benchmark_name=benchmark_name,
        summary=summary,
        features={"text": "string"},
        **attributes,
    )
    TASKS.add(entry.id, entry)


lm(
    "wikitext-2",
    "WikiText-2",
    "Wikipedia's good articles, 2 million words",
    hub="Salesforce/wikitext",
    hub_config="wikitext-2-raw-v1",
)
lm(
    "wikitext-103",
    "WikiText-103",
    "Wikipedia's good articles, 100 million words",
    hub="Salesforce/wikitext",
    hub_config="wikitext-103-raw-v1",
)
lm("text", "text", "the text files of a folder: data.dir", hub="")
