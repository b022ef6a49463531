"""Tokenizers of the tiny backbones, in the layout of each family: for synthetic data, or trained on a text.

The one for synthetic data is a WordPiece model whose whole words are `language.words` and whose only pieces are single
characters, so that a word that no generator emits falls apart into a known beginning and letters.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from camex_ft.synthetic.language import words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_LENGTH = 512
TRAINED_SIZE = 4096  # tokens of a tokenizer that is made for a text
SPACE = "Ġ"  # how byte-level tokenizers write a word's leading space


@dataclass(frozen=True)
class Layout:
    """Special tokens of a family.

    Attributes:
        special: role (as `PreTrainedTokenizerFast` calls it) to token; their order is that of the ids from 0.
        single: template of one text, in the notation of `tokenizers.processors.TemplateProcessing`.
        pair: template of two texts.
        inputs: the tensors that the tokenizer makes.
        byte_level: make a `Qwen2Tokenizer`.
    """

    special: dict[str, str]
    single: str
    pair: str
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    byte_level: bool = False

    def without_end(self) -> Layout:
        """Return the same without the end token that closes a text: a language model goes on from there."""
        end = f" {self.special['eos_token']}"
        return replace(self, single=self.single.removesuffix(end), pair=self.pair.removesuffix(end))


def build_tokenizer(layout: Layout) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a family, which saves, and loads with `AutoTokenizer`, like any other."""
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    settings = _settings(layout)
    if layout.byte_level:
        vocab, merges = byte_level_tables(layout)
        settings |= {"vocab": vocab, "merges": merges, "add_prefix_space": True}
        tokenizer = Qwen2Tokenizer(**settings)
        tokenizer.backend_tokenizer.post_processor = _template(layout)
        return tokenizer
    core = Tokenizer(models.WordPiece(vocabulary(layout), unk_token=layout.special["unk_token"]))
    core.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = _template(layout)
    return PreTrainedTokenizerFast(tokenizer_object=core, **settings)


def train_tokenizer(
    layout: Layout, texts: Iterable[str], *, size: int = TRAINED_SIZE
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a family for texts that no generator made: a byte-level byte-pair model, trained on them.

    It knows every byte, so that nothing is lost; the same texts give the same tokenizer.

    Args:
        layout: of the family.
        texts: to be trained on, in pieces.
        size: tokens, special ones included; fewer where the texts hold too few pairs.
    """
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    core = Tokenizer(models.BPE())
    if layout.byte_level:  # what loads it again splits texts by its own rule
        core.pre_tokenizer = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer.pre_tokenizer
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(dict.fromkeys(layout.special.values())),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    if layout.byte_level:
        tables = json.loads(core.to_str())["model"]
        merges: Any = [tuple(pair) for pair in tables["merges"]]
        tokenizer = Qwen2Tokenizer(vocab=tables["vocab"], merges=merges, **_settings(layout))
        tokenizer.backend_tokenizer.post_processor = _template(layout)
        return tokenizer
    core.post_processor = _template(layout)
    return PreTrainedTokenizerFast(tokenizer_object=core, **_settings(layout))


def vocabulary(layout: Layout) -> dict[str, int]:
    """Return token to id: special tokens, characters, pieces, words; the same order on every machine."""
    characters = string.ascii_lowercase + string.digits
    pieces = ["##" + c for c in characters]
    return _numbered([*layout.special.values(), *characters, *string.punctuation, *pieces, *words()])


def byte_level_tables(layout: Layout) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and merges of a byte-pair model that knows the same words, also with a capital.

    `AutoTokenizer` makes a `Qwen2Tokenizer` of whatever it finds beside a Qwen2 model, with Qwen2's own rules for
    splitting and case, so only such a tokenizer comes back as it was saved. Every merge adds one character to the
    beginning of a word: no merge applies inside a word, and a word is always read from its start.
    """
    known = [*words(), *(word.capitalize() for word in words()), "@placeholder", *string.punctuation]
    grown = dict.fromkeys(SPACE + word[:end] for word in known for end in range(1, len(word) + 1))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(token[:-1], token[-1]) for token in grown]
    return _numbered([*layout.special.values(), *alphabet, *grown]), merges


def _settings(layout: Layout) -> dict[str, Any]:
    return {
        "model_max_length": MAX_LENGTH,
        "model_input_names": list(layout.inputs),
        "padding_side": "right",
        **layout.special,
    }


def _template(layout: Layout) -> processors.TemplateProcessing:
    ids = _numbered(list(layout.special.values()))
    return processors.TemplateProcessing(
        single=layout.single, pair=layout.pair, special_tokens=list(ids.items())
    )


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}
