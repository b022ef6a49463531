"""Tokenised rows: lengths, labels, end tokens, separators, padding; every tokenizer."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import camex_ft
from camex_ft import synthetic
from camex_ft.backbones.loading import agree_on_padding
from camex_ft.tasks.classification import collator, encode, separates, shorten_around_spans
from camex_ft.utils import registry
from camex_ft.utils.errors import UserError

LONG = " ".join(["rain"] * 60)


def tokenizer_of(family):
    return synthetic.backbone(family, num_labels=2)[1]


def bare_tokenizer(**special):
    """Return a tokenizer of words and line feeds that, like GPT-2's, adds no token of its own."""
    words = ["<unk>", "<end>", "\n", "a", "b", "c", "*"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **special)


@pytest.fixture
def pair_rows(rows):
    """Return a function: texts -> rows of SuperGLUE's CB."""
    return lambda premise, hypothesis="so": rows("superglue/cb", premise=premise, hypothesis=hypothesis)


@pytest.mark.parametrize("family", registry.EMBEDDED.names())
@pytest.mark.parametrize(
    "name", ["glue/sst2", "superglue/cb", "superglue/wic", "superglue/copa", "glue/stsb"]
)
def test_batches_fit_the_model(family, name, rows):
    task = registry.TASKS.get(name)
    model, tokenizer = synthetic.backbone(family, num_labels=task.num_labels)
    data = encode(rows(name), tokenizer, max_length=32)
    batch = collator(tokenizer)([data[i] for i in range(len(data))])
    assert set(batch) == {*tokenizer("a"), "labels"}
    assert batch["labels"].dtype == (torch.float32 if task.regression else torch.int64)
    lengths = batch["attention_mask"].sum(1)
    assert lengths.max() == batch["input_ids"].shape[1]  # padded to the longest row, no further
    with torch.no_grad():
        out = model(**batch)
    assert out.logits.shape == (len(data), task.num_labels) and torch.isfinite(out.loss)


@pytest.mark.parametrize("family", registry.EMBEDDED.names())
def test_no_row_is_longer_than_max_length(family, pair_rows):
    data = encode(pair_rows(LONG, LONG), tokenizer_of(family), max_length=24)
    assert len(data[0]["input_ids"]) == 24
    assert len(data[1]["input_ids"]) < 24


def test_the_longer_text_is_cut(pair_rows):
    tokenizer = tokenizer_of("bert")
    row = encode(pair_rows(LONG, "c d e"), tokenizer, max_length=20)[0]
    assert tokenizer.decode(row["input_ids"]).endswith("[SEP] c d e [SEP]")


@pytest.mark.parametrize("family", ["t5", "t5-gated", "roberta", "llama"])
@pytest.mark.parametrize("text", ["", "a </s> b", "</s></s>", LONG + " </s>", "<pad> <unk>"])
def test_every_row_has_as_many_end_tokens(family, text, pair_rows):
    tokenizer = tokenizer_of(family)
    data = encode(pair_rows(text, text), tokenizer, max_length=24)
    counts = [row["input_ids"].count(tokenizer.eos_token_id) for row in data]
    assert counts[0] == counts[1] == tokenizer("a", "b")["input_ids"].count(tokenizer.eos_token_id)
    assert tokenizer.pad_token_id not in data[0]["input_ids"]


def test_t5_classifies_texts_that_hold_its_end_token(pair_rows):
    model, tokenizer = synthetic.backbone("t5", num_labels=3)
    data = encode(pair_rows("good </s> bad"), tokenizer, max_length=32)
    batch = collator(tokenizer)([data[0], data[1]])
    assert model(**batch).logits.shape == (2, 3)  # it refuses rows that differ in the number of end tokens


def test_text_is_tokenised_as_ever_afterwards(pair_rows):
    tokenizer = tokenizer_of("t5")
    before = tokenizer("a </s> b")["input_ids"]
    encode(pair_rows("a </s> b"), tokenizer, max_length=32)
    assert tokenizer("a </s> b")["input_ids"] == before


def test_withheld_labels_are_left_out(rows):
    data = encode(rows("glue/sst2", label=-1), tokenizer_of("bert"), max_length=16)
    assert "labels" not in data.column_names


def test_order_is_kept_over_batches():
    task = registry.TASKS.get("glue/sst2")
    examples = [{"sentence": "a" * (i % 7 + 1), "label": i % 2, "idx": i} for i in range(2500)]
    made = task.rows(Dataset.from_list(examples, features=task.features), "train")
    data = encode(made, tokenizer_of("bert"), max_length=16)
    assert data["labels"][:] == made["label"][:]
    lengths = np.array([len(ids) for ids in data["input_ids"]])
    assert (lengths == np.array([i % 7 + 3 for i in range(2500)])).all()  # letters are tokens of their own


def test_max_length_without_room_for_text(pair_rows):
    with pytest.raises(
        UserError, match=r"task.max_length is 9, which leaves 6 tokens for text; expected at least 11"
    ):
        encode(pair_rows("a"), tokenizer_of("bert"), max_length=9)


# Sides, and rows without tokens

MERGING = {"protocol": "smear", "experts": 2}
TEXTS = [
    "the soup was not sharp because the soup was dark",
    "the cook",
    "",
    "rain",
    "the guest thanked the cook",
]


def left_sided(family, **options):
    """Return an upcycled backbone, and its tokenizer with both sides on the left."""
    model, tokenizer = synthetic.backbone(family, seed=1, **options)
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    return camex_ft.upcycle(model, merging=MERGING).eval(), tokenizer


def outputs_by(size, model, tokenizer, data):
    """Return the logits of all rows and the mean loss, in batches of `size`."""
    batches = [list(data.select(range(i, min(i + size, len(data))))) for i in range(0, len(data), size)]
    with torch.no_grad():
        made = [model(**collator(tokenizer)(batch)) for batch in batches]
    losses = [out.loss * len(batch) for out, batch in zip(made, batches, strict=True)]
    logits = [out.logits for out in made]
    return torch.cat(logits), sum(losses) / len(data)


def examples_of(name, texts=TEXTS):
    task = registry.TASKS.get(name)
    columns = [column for column in task.columns if column != "idx"]
    return task.rows(
        Dataset.from_list(
            [{**dict.fromkeys(columns, text), "label": i % 2, "idx": i} for i, text in enumerate(texts)],
            features=task.features,
        ),
        "train",
    )


@pytest.mark.parametrize("family", registry.EMBEDDED.names())
def test_logits_and_loss_do_not_depend_on_the_batch_with_a_left_sided_tokenizer(family):
    model, tokenizer = left_sided(family, num_labels=2)
    data = encode(examples_of("glue/sst2"), tokenizer, max_length=24)
    alone, loss = outputs_by(1, model, tokenizer, data)
    for size in (3, 32):
        logits, mean = outputs_by(size, model, tokenizer, data)
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)  # float32, two layers
        torch.testing.assert_close(mean, loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", registry.EMBEDDED.names())
def test_a_batch_is_the_same_whatever_the_side_of_the_tokenizer(family):
    tokenizer, made = tokenizer_of(family), []
    for side in ("left", "right"):
        tokenizer.padding_side = tokenizer.truncation_side = side
        data = encode(examples_of("glue/rte"), tokenizer, max_length=16)
        made.append(collator(tokenizer)(list(data)))
        assert tokenizer.padding_side == tokenizer.truncation_side == side  # as it is saved
    assert list(made[0]) == list(made[1])
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_a_row_loses_its_last_tokens_whatever_the_side_of_the_tokenizer(pair_rows):
    tokenizer = tokenizer_of("bert")
    right = encode(pair_rows("cook " + LONG, "c d e"), tokenizer, max_length=20)[0]
    tokenizer.truncation_side = "left"
    assert encode(pair_rows("cook " + LONG, "c d e"), tokenizer, max_length=20)[0] == right
    assert tokenizer.decode(right["input_ids"]).startswith("[CLS] cook r")


@pytest.mark.parametrize("special", [{"bos_token": "<end>"}, {"eos_token": "<end>"}, {"pad_token": "<end>"}])
@pytest.mark.parametrize("text", ["", " ", "  \t "])
def test_one_token_stands_for_a_text_without_any(special, text, rows):
    bare = bare_tokenizer(**special, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    bare.backend_tokenizer.normalizer = normalizers.Strip()
    data = encode(rows("glue/sst2", sentence=text), bare, max_length=16)
    assert data[0] == {"input_ids": [1], "token_type_ids": [0], "attention_mask": [1], "labels": 0}


def test_without_any_token_to_stand_for_it_an_empty_text_is_refused(rows):
    with pytest.raises(UserError, match=r"row 1 has no tokens.*expected a text"):
        encode(rows("glue/sst2", sentence=""), bare_tokenizer(), max_length=16)


@pytest.mark.parametrize("name", ["glue/sst2", "glue/rte"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "roberta"])
def test_a_tokenizer_without_special_tokens_reads_empty_texts_alone_and_in_batches(family, name):
    """As GPT-2's, which puts nothing around a text and pads with its end token."""
    model, tokenizer = left_sided(family, num_labels=2)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.pad_token
    model.config.pad_token_id = tokenizer.pad_token_id
    data = encode(examples_of(name, [" ", "the cook", "", "the soup was dark"]), tokenizer, max_length=24)
    assert len(data[2]["input_ids"]) <= 1 + (name == "glue/rte")
    alone, loss = outputs_by(1, model, tokenizer, data)
    logits, mean = outputs_by(4, model, tokenizer, data)
    assert torch.isfinite(alone).all() and torch.isfinite(loss)
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)  # float32, two layers
    torch.testing.assert_close(mean, loss, atol=1e-5, rtol=0)


# Marked spans


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
@pytest.mark.parametrize("place", ["first", "last", "middle"])
def test_marked_words_survive_truncation(family, place, rows):
    before, after = {"first": (0, 60), "last": (60, 0), "middle": (40, 40)}[place]
    sentence = " ".join(["rain"] * before + ["bank"] + ["snow"] * after)
    start = sentence.index("bank")
    changes = {"sentence1": sentence, "start1": start, "end1": start + 4}
    tokenizer = tokenizer_of(family)
    row = encode(rows("superglue/wic", **changes), tokenizer, max_length=30)[0]
    text = tokenizer.decode(row["input_ids"], skip_special_tokens=True).replace(" ", "").replace("#", "")
    assert len(row["input_ids"]) <= 30
    assert text.count("*bank*") == 2
    assert text.count("rain") + text.count("snow") >= 1  # what else fits is kept


def test_both_spans_of_wsc_survive_truncation(rows):
    text = "Ann said " + "rain and snow and " * 30 + "that she left"
    count = len(text.split())
    made = rows("superglue/wsc", text=text, span2_index=count - 2)
    tokenizer = tokenizer_of("bert")
    row = encode(made, tokenizer, max_length=40)[0]
    decoded = tokenizer.decode(row["input_ids"]).replace(" ", "").replace("##", "")
    assert "*ann*" in decoded and "#she#" in decoded
    assert 34 <= len(row["input_ids"]) <= 40  # what fits is used: a word is at most six tokens


# Tokenizers that put nothing between the texts, and those that have no padding token


def test_a_line_feed_separates_where_the_tokenizer_does_not(pair_rows):
    bare = bare_tokenizer(pad_token="<end>")
    assert not separates(bare) and separates(tokenizer_of("bert"))
    row = encode(pair_rows("a b", "c"), bare, max_length=16)[0]
    assert bare.convert_ids_to_tokens(row["input_ids"]) == ["a", "b", "\n", "c"]


def test_single_texts_get_no_line_feed(rows):
    bare = bare_tokenizer(pad_token="<end>")
    row = encode(rows("glue/sst2", sentence="a b"), bare, max_length=16)[0]
    assert bare.convert_ids_to_tokens(row["input_ids"]) == ["a", "b"]


def test_padding_falls_back_on_the_end_token():
    bare = bare_tokenizer(eos_token="<end>")
    model, _ = synthetic.backbone("gpt2")
    with pytest.raises(UserError, match="set its pad_token"):
        collator(bare)
    size = model.get_input_embeddings().weight.shape
    agree_on_padding(model, bare, "test")
    assert bare.pad_token == "<end>" and model.config.pad_token_id == bare.eos_token_id == 1
    assert model.get_input_embeddings().weight.shape == size
    batch = collator(bare)([{"input_ids": [3]}, {"input_ids": [3, 4, 5]}])
    assert batch["input_ids"].tolist() == [[3, 1, 1], [3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


def test_a_tokenizers_own_padding_stays():
    model, tokenizer = synthetic.backbone("llama")
    model.config.pad_token_id = None
    agree_on_padding(model, tokenizer, "test")
    assert tokenizer.pad_token == "<pad>" and model.config.pad_token_id == tokenizer.pad_token_id


def test_neither_padding_nor_end_token():
    model, _ = synthetic.backbone("gpt2")
    with pytest.raises(UserError, match="neither a padding token nor an end token"):
        agree_on_padding(model, bare_tokenizer(), "test")


def test_padded_rows_get_the_same_logits_with_the_end_token_as_padding(rows):
    model, tokenizer = synthetic.backbone("gpt2")
    tokenizer.pad_token = None
    agree_on_padding(model, tokenizer, "test")
    data = encode(rows("glue/sst2", sentence="rain"), tokenizer, max_length=16)
    both = model(**collator(tokenizer)([data[0], data[1]])).logits
    alone = model(**collator(tokenizer)([data[0]])).logits
    assert torch.allclose(both[0], alone[0], atol=1e-6)  # float32, two layers


def words(text: str) -> int:
    return len(text.split())


def span(text: str, piece: str) -> list[int]:
    return [text.index(piece), text.index(piece) + len(piece)]


TEXT = "one two three * four * five six seven eight"


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (10, TEXT),
        (5, "three * four * five"),
        (6, "two three * four * five"),  # at the same distance the earlier word stays
        (4, "three * four *"),
        (3, "* four *"),
        (2, "* four"),
        (0, ""),
    ],
)
def test_the_nearest_words_stay(room, expected):
    assert shorten_around_spans(TEXT, [span(TEXT, "* four *")], room, words) == expected


def test_both_spans_stay_when_they_are_far_apart():
    text = "* Ann * " + "and so on " * 20 + "# she # left"
    shorter = shorten_around_spans(text, [span(text, "* Ann *"), span(text, "# she #")], 8, words)
    assert shorter == "* Ann * and on # she #"


def test_without_spans_the_beginning_stays():
    assert shorten_around_spans("a b c d", [], 2, words) == "a b"


def test_a_text_that_fits_keeps_its_blanks():
    assert shorten_around_spans("a  b\nc", [[0, 1]], 3, words) == "a  b\nc"


@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), min_size=1, max_size=30), st.data())
def test_as_much_as_fits_in_order(pieces, data):
    text = " ".join(pieces)
    start = data.draw(st.integers(0, len(text) - 1))
    room = data.draw(st.integers(0, 40))
    shorter = shorten_around_spans(text, [[start, start + 1]], room, words)
    assert words(shorter) == min(room, len(pieces))
    rest = iter(pieces)
    assert all(word in rest for word in shorter.split())  # a subsequence
