"""A word-level tokenizer over the project's own vocabulary, laid out as each family needs it.

It is a WordPiece model whose whole words are `lexicon.words` and whose only pieces are single characters,
so that a word which no generator emits falls apart into a known beginning and letters, and is not lost.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from camex_ft.embedded.lexicon import words

MAX_LENGTH = 512


@dataclass(frozen=True)
class Layout:
    """Special tokens of a family.

    Attributes:
        special: role (as `PreTrainedTokenizerFast` calls it) to token; their order is that of the ids from 0.
        single: template of one text, in the notation of `tokenizers.processors.TemplateProcessing`.
        pair: template of two texts.
        inputs: the tensors that the tokenizer makes.
        side: the side that padding goes to.
    """

    special: dict[str, str]
    single: str
    pair: str
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    side: str = field(default="right")


def vocabulary(layout: Layout) -> dict[str, int]:
    """Return token to id: special tokens, characters, pieces, words; the same order on every machine."""
    characters = string.ascii_lowercase + string.digits
    tokens = [
        *layout.special.values(),
        *characters,
        *string.punctuation,
        *("##" + c for c in characters),
        *words(),
    ]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def build_tokenizer(layout: Layout) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a family, which saves and loads like any other."""
    table = vocabulary(layout)
    core = Tokenizer(models.WordPiece(table, unk_token=layout.special["unk_token"]))
    core.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single=layout.single,
        pair=layout.pair,
        special_tokens=[(token, table[token]) for token in layout.special.values()],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=MAX_LENGTH,
        model_input_names=list(layout.inputs),
        padding_side=layout.side,
        **layout.special,
    )
