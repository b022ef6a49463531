"""The synthetic corpus for language modelling, and tokenizers that are made for a text."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from camex_ft.synthetic import CORPORA, DOMAINS, backbone, corpus
from camex_ft.synthetic.language import PEOPLE, THINGS
from camex_ft.synthetic.tokenizer import TRAINED_SIZE
from camex_ft.utils.registry import EMBEDDED

NAMES = [name for name in CORPORA.names() if name.startswith("lm/")]
FAMILIES = [name for name in EMBEDDED.names() if "causal-lm" in EMBEDDED.get(name).heads]
FOREIGN = ["Zoë's naïve\tcafé : 12,345 <pad> </s> [UNK] ŋ 日本\n", "\n", "  two  blanks, and a tail   \n"] * 3


@cache
def load(name: str) -> dict[str, Dataset]:
    return corpus(name)


def tokens(split: str) -> list[int]:
    _, tokenizer = backbone("gpt2", head="causal-lm")
    texts = load("lm/wikitext-2")[split]["text"]
    return tokenizer("\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_columns_splits_and_balanced_domains(name: str) -> None:
    assert NAMES == ["lm/text", "lm/wikitext-103", "lm/wikitext-2"]
    assert list(load(name)) == ["train", "validation", "test"]
    for split, data in load(name).items():
        assert data.column_names == ["text", "domain"], split
        assert set(Counter(data["domain"]).values()) == {len(data) // len(DOMAINS)}
        assert all("\n" not in text for text in data["text"])


def test_the_seed_decides_everything() -> None:
    assert corpus("lm/text")["test"][:] == load("lm/text")["test"][:]
    assert corpus("lm/text", seed=1)["test"][:] != load("lm/text")["test"][:]
    assert load("lm/wikitext-2")["test"][:] != load("lm/text")["test"][:]


def test_every_word_is_one_token() -> None:
    _, tokenizer = backbone("gpt2", head="causal-lm")
    words = {
        word for data in load("lm/wikitext-2").values() for text in data["text"] for word in text.split()
    }
    pieces = tokenizer.tokenize(" ".join(sorted(words)))
    assert not [piece for piece in pieces if piece.startswith("##") or piece == "<|unk|>"]


def test_a_story_keeps_to_its_domain_and_its_things() -> None:
    for row in load("lm/wikitext-2")["test"]:
        words = set(row["text"].lower().replace(".", "").split())
        for table, most in ((PEOPLE, 2), (THINGS, 3)):
            found = [len(words & set(own)) for own in table]
            assert found[row["domain"]] <= most
            assert sum(found) == found[row["domain"]]


def test_counts_of_words_and_pairs_are_not_enough() -> None:
    """Perplexity of smoothed counts; a tiny GPT-2 comes below 3 (docs/results.md)."""
    train, validation = tokens("train"), tokens("validation")
    single, pairs = Counter(train), Counter(pairwise(train))

    def word(w: int) -> float:
        return (single[w] + 0.5) / (len(train) + 0.5 * len(single))

    def after(v: int, w: int) -> float:
        return (pairs[v, w] + 2 * word(w)) / (single[v] + 2)

    def perplexity(found: list[float]) -> float:
        return math.exp(-np.log(found).mean())

    assert perplexity([word(w) for w in validation]) > 40
    assert perplexity([after(v, w) for v, w in pairwise(validation)]) > 6


# -- tokenizers for other texts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_made_for_a_text_loses_nothing(family: str) -> None:
    model, tokenizer = backbone(family, head="causal-lm", texts=FOREIGN)
    text = "".join(FOREIGN) + "what was not in it: \x00 ✓ "
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert model.config.vocab_size == len(tokenizer) <= TRAINED_SIZE
    assert model.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_text_gives_the_same_tokenizer_and_it_loads_again(family: str, tmp_path: Path) -> None:
    texts = load("lm/text")["train"]["text"][:200]
    (model, one), (_, other) = (backbone(family, head="causal-lm", texts=iter(texts)) for _ in range(2))
    assert one.get_vocab() == other.get_vocab()
    model.save_pretrained(tmp_path)
    one.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*texts[:20], *FOREIGN):
        assert again(text)["input_ids"] == one(text)["input_ids"] == other(text)["input_ids"]


def test_its_size_is_what_was_promised() -> None:
    texts = (f"word{i * 7919 % 10007} " * 3 for i in range(6000))
    _, tokenizer = backbone("gpt2", head="causal-lm", texts=texts)
    assert len(tokenizer) == TRAINED_SIZE
