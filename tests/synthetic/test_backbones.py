"""Every tiny backbone with every head it has, and the tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from camex_ft.backbones.heads import HEADS
from camex_ft.synthetic import backbone
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import EMBEDDED, positions

FAMILIES = EMBEDDED.names()
PAIR = (["The soup was sharp.", "The saw was not very sharp."], ["Was it good?", "It was good."])
LAYOUTS = {
    "t5": "soup </s> saw </s>",
    "t5-gated": "soup </s> saw </s>",
    "bert": "[CLS] soup [SEP] saw [SEP]",
    "distilbert": "[CLS] soup [SEP] saw [SEP]",
    "roberta": "<s> soup </s> </s> saw </s>",
    "gpt2": "soup <|endoftext|> saw <|endoftext|>",
    "llama": "<s> soup </s> saw </s>",
    "mistral": "<s> soup </s> saw </s>",
    "qwen2": "<s> Ġsoup </s> Ġsaw </s>",
}


def test_the_families_are_those_of_the_project() -> None:
    assert set(FAMILIES) == set(LAYOUTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_suits_heads_that_it_has_and_lengths_that_it_reads(family: str) -> None:
    tiny = EMBEDDED.get(family)
    assert set(tiny.task_heads) == {h for h in HEADS if h in tiny.heads and tiny.suits(h, 512)}
    assert "sequence-classification" in tiny.task_heads
    limit = positions(tiny.configuration()[0])
    assert limit is None or limit >= 512
    assert not tiny.suits("sequence-classification", 513)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_with_every_head(family: str, head: str) -> None:
    if head not in EMBEDDED.get(family).heads:
        with pytest.raises(UserError, match=f"'{head}'.*It has: base"):
            backbone(family, head=head)
        return
    model, tokenizer = backbone(family, head=head, num_labels=3)
    inputs = tokenizer(*PAIR, padding=True, return_tensors="pt")
    batch, length = inputs["input_ids"].shape
    if head == "multiple-choice":
        inputs = {name: tensor[None] for name, tensor in inputs.items()}
    if family.startswith("t5") and head in ("base", "seq2seq-lm"):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    output = model(**inputs)
    shapes = {
        "base": (batch, length, 64),
        "sequence-classification": (batch, 3),
        "token-classification": (batch, length, 3),
        "question-answering": (batch, length),
        "multiple-choice": (1, batch),
    }
    logits = output.start_logits if head == "question-answering" else output[0]
    assert logits.shape == shapes.get(head, (batch, length, len(tokenizer)))
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_decides_the_weights_and_no_global_state(family: str) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    weights = [backbone(family, seed=seed)[0].state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_change_a_classifier(family: str) -> None:
    model, tokenizer = backbone(family)
    alone = model(**tokenizer(PAIR[0][0], PAIR[1][0], return_tensors="pt")).logits
    batch = model(**tokenizer(*PAIR, padding=True, return_tensors="pt")).logits
    # float32 sums of 64 terms in another order
    torch.testing.assert_close(alone[0], batch[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_label_names_are_kept_and_the_folder_loads_with_the_auto_classes(family: str, tmp_path: Path) -> None:
    names = {0: "no", 1: "maybe", 2: "yes"}
    model, tokenizer = backbone(family, id2label=names, label2id={v: k for k, v in names.items()})
    assert model.config.num_labels == 3
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.config.id2label == names
    inputs = tokenizer(*PAIR, padding=True, return_tensors="pt")
    other = again(*PAIR, padding=True, return_tensors="pt")
    assert set(inputs) == set(other)
    assert all(torch.equal(inputs[name], other[name]) for name in inputs)
    assert torch.equal(model(**inputs).logits, loaded(**other).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_of_a_pair(family: str) -> None:
    model, tokenizer = backbone(family)
    encoded = tokenizer("soup", "saw")
    assert " ".join(tokenizer.convert_ids_to_tokens(encoded["input_ids"])) == LAYOUTS[family]
    assert ("token_type_ids" in encoded) == (family == "bert")
    if family == "bert":
        assert encoded["token_type_ids"] == [0, 0, 0, 1, 1]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for role in ("pad", "bos", "eos"):
        token = getattr(tokenizer, f"{role}_token_id")
        if token is not None:
            assert getattr(model.config, f"{role}_token_id") == token


@pytest.mark.parametrize("family", [f for f in FAMILIES if "causal-lm" in EMBEDDED.get(f).heads])
def test_a_language_models_texts_stay_open(family: str, tmp_path: Path) -> None:
    _, tokenizer = backbone(family, head="causal-lm")
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = each("the broth felt hot")["input_ids"]
        assert ids[-1] != each.eos_token_id
        assert each.decode(ids, skip_special_tokens=True).strip() == "the broth felt hot"


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"qwen2"}))
def test_words_that_no_generator_emits_are_not_lost(family: str) -> None:
    _, tokenizer = backbone(family)
    # "Café" loses its accent, "souped" keeps its known beginning, and only a script without letters is unknown
    tokens = tokenizer.tokenize("Café souped! Soup")
    assert tokens == ["c", "##a", "##f", "##e", "soup", "##e", "##d", "!", "soup"]
    assert tokenizer.tokenize("火") == [tokenizer.unk_token]


def test_qwen2_reads_bytes_and_knows_words_with_and_without_a_capital() -> None:
    _, tokenizer = backbone("qwen2")
    tokens = tokenizer.tokenize("The soup was @placeholder's , not Souped.")
    assert " ".join(tokens).replace("Ġ", "_") == "_The _soup _was _@ _placeholder _' s _, _not _Soup e d _."
    assert tokenizer.decode(tokenizer("Café 火", add_special_tokens=False)["input_ids"]) == " Café 火"


def test_a_head_that_others_have_is_not_what_was_meant() -> None:
    with pytest.raises(UserError, match=r"has no head 'causal-lm'. It has: base, sequence-classification"):
        backbone("t5", head="causal-lm")


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'roberta'"):
        backbone("robert")
