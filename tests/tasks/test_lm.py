"""Language modelling: what a model is scored by, against plain loops and transformers' own loss; what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from camex_ft import synthetic
from camex_ft.tasks import lm
from camex_ft.tasks.base import Prepared
from camex_ft.tasks.lm import IGNORED, LanguageModellingConfig, collate
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import EMBEDDED, TASKS

TASK = TASKS.get("lm/wikitext-2")
TEXT = ["the cook thanked the guest .", "", "the soup was not sharp because the soup was dark .", "the end"]
FAMILIES = [name for name in EMBEDDED.names() if "causal-lm" in EMBEDDED.get(name).heads]


def rows(lines: list[str] = TEXT) -> Dataset:
    return TASK.rows(Dataset.from_dict({"text": lines}), "validation")


def settings(**changes: int) -> LanguageModellingConfig:
    return LanguageModellingConfig(suite="lm", name="wikitext-2", **{"block_size": 8, "stride": 3, **changes})


def collected(
    model: Any, tokenizer: Any, task: LanguageModellingConfig, *, batch: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """What an evaluation collects of the rows, in batches."""
    encoded = TASK.encode(rows(), "validation", tokenizer, task)
    made = []
    for start in range(0, len(encoded), batch):
        inputs = collate([encoded[i] for i in range(start, min(start + batch, len(encoded)))])
        with torch.no_grad():
            loss, parts = TASK.outputs(model, inputs, tokenizer, task)
        assert loss is None and parts[0].dtype == torch.float32
        made.append([part.numpy() for part in parts])
    nll, count = (np.concatenate(part) for part in zip(*made, strict=True))
    return nll, count


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_plain_loop_over_tokens(family: str) -> None:
    """Each token by itself, given those before it that its window holds."""
    model, tokenizer = synthetic.backbone(family, head="causal-lm", seed=1)
    task = settings()
    nll, count = collected(model, tokenizer, task)
    ids = torch.tensor(TASK.encode(rows(), "train", tokenizer, settings(block_size=512))[0]["input_ids"])
    total, done = 0.0, task.block_size
    for i in range(1, len(ids)):
        while i >= done:
            done = min(done + task.step, len(ids))
        given = ids[max(done - task.block_size, 0) : i]
        with torch.no_grad():
            p = model(input_ids=given[None]).logits[0, -1].double().softmax(0)
        total -= math.log(p[ids[i]])
    assert count.sum() == len(ids) - 1
    assert nll.astype(float).sum() == pytest.approx(total, rel=1e-5)  # float32 against float64


@pytest.mark.parametrize("family", FAMILIES)
def test_one_window_has_transformers_own_loss(family: str) -> None:
    model, tokenizer = synthetic.backbone(family, head="causal-lm", seed=1)
    task = settings(block_size=64)
    nll, count = collected(model, tokenizer, task)
    (row,) = TASK.encode(rows(), "validation", tokenizer, task)
    with torch.no_grad():
        loss = model(**collate([row])).loss.item()
    scores = TASK.metrics((nll, count), rows())
    assert scores["loss"] == pytest.approx(loss, rel=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)


def test_batches_do_not_matter() -> None:
    model, tokenizer = synthetic.backbone("gpt2", head="causal-lm", seed=1)
    (one, counts), (many, same) = (collected(model, tokenizer, settings(), batch=b) for b in (1, 5))
    assert counts.tolist() == same.tolist()
    np.testing.assert_allclose(one, many, rtol=1e-5)  # float32, sums in another order


def test_metrics_are_their_formulas() -> None:
    nll, count = np.array([2.0, 4.5], dtype=np.float32), np.array([4, 6])
    text = "two words\n\nand é\n"  # 4 words, 18 bytes
    scores = TASK.metrics((nll, count), rows(["two words", "", "and é"]))
    assert len(text.encode()) == 18
    assert scores == {
        "perplexity": pytest.approx(math.exp(0.65)),
        "word_perplexity": pytest.approx(math.exp(6.5 / 4)),
        "bits_per_byte": pytest.approx(6.5 / math.log(2) / 18),
        "loss": pytest.approx(0.65),
    }
    assert not TASK.greater_is_better and TASK.primary == "perplexity"


@pytest.mark.parametrize(("nll", "expected"), [(1e9, math.inf), (math.inf, math.inf), (math.nan, math.nan)])
def test_what_is_beyond_a_float_is_no_crash(nll: float, expected: float) -> None:
    scores = TASK.metrics((np.array([nll]), np.array([2])), rows())
    assert scores["perplexity"] == pytest.approx(expected, nan_ok=True)
    assert scores["word_perplexity"] == pytest.approx(expected, nan_ok=True)


def test_a_batch_is_padded_and_its_context_is_not_scored() -> None:
    made = collate([{"input_ids": [5, 6, 7], "context": 2}, {"input_ids": [8, 9], "context": 0}])
    assert made["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert made["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert made["labels"].tolist() == [[IGNORED, IGNORED, 7], [8, 9, IGNORED]]


def test_training_reads_blocks_and_evaluation_windows() -> None:
    _, tokenizer = synthetic.backbone("gpt2", head="causal-lm")
    task = settings(block_size=5)
    splits = {split: Dataset.from_dict({"text": TEXT}) for split in ("train", "validation")}
    data = Prepared.make(TASK, splits, tokenizer, task)
    blocks = data.train["input_ids"][:]
    windows = data.encoded["validation"]
    whole = TASK.encode(rows(), "train", tokenizer, settings(block_size=512))[0]["input_ids"]
    assert [token for block in blocks for token in block] == whole[: len(whole) // 5 * 5]
    assert set(map(len, blocks)) == {5}
    assert set(data.train["context"][:]) == {0}
    assert len(windows) > len(blocks)
    assert data.kinds("validation") == {} and data.origin["validation"] is None


def test_a_text_shorter_than_a_block_is_one_block_and_one_window() -> None:
    model, tokenizer = synthetic.backbone("gpt2", head="causal-lm")
    task = settings(block_size=512)
    for split in ("train", "validation"):
        (row,) = TASK.encode(rows(), split, tokenizer, task)
        assert 2 < len(row["input_ids"]) < 512
    _, count = collected(model, tokenizer, task)
    assert count.tolist() == [len(row["input_ids"]) - 1]


def test_a_text_of_one_token_is_refused() -> None:
    _, tokenizer = synthetic.backbone("gpt2", head="causal-lm")
    with pytest.raises(UserError, match="the validation split has 1 token: expected at least 2"):
        TASK.encode(rows(["cook"]), "validation", tokenizer, settings())


def test_a_split_without_words_is_refused() -> None:
    with pytest.raises(UserError, match="the test split holds no text in its 2 rows"):
        TASK.check_split(Dataset.from_dict({"text": ["", " \n"]}), "test")
    TASK.check_split(Dataset.from_dict({"text": ["", "a"]}), "test")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_that_the_backbone_cannot_read_is_refused(family: str) -> None:
    model, _ = synthetic.backbone(family, head="causal-lm")
    TASK.check_backbone(model.config, settings(block_size=512))
    with pytest.raises(UserError, match=r"block_size is 513.* at most 512 .*task.block_size=512"):
        TASK.check_backbone(model.config, settings(block_size=513))


def test_there_is_nothing_to_predict() -> None:
    for refused in (
        lambda: TASK.predict((), rows()),
        lambda: TASK.submission([], rows(), "x"),
    ):
        with pytest.raises(UserError, match="camex-ft generate RUN"):
            refused()
    assert TASK.labelled(rows())


def test_large_vocabularies_are_taken_one_window_at_a_time() -> None:
    """The same numbers as of the whole batch at once."""
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 6, 11), torch.randint(0, 11, (3, 6))
    labels = ids.clone()
    labels[:, :2] = IGNORED

    def model(**inputs: Any) -> Any:
        assert "labels" not in inputs  # else the model would make a loss of its own
        return type("Output", (), {"logits": logits})

    _, (nll, count) = TASK.outputs(model, {"input_ids": ids, "labels": labels}, None, settings())
    whole = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
    torch.testing.assert_close(nll, whole)
    assert count.tolist() == [4, 4, 4]


LINES = st.lists(st.text(alphabet="ab =\t\u2028é"), min_size=1)
LENGTHS, SIZES = st.integers(1, 400), st.integers(2, 60)


@given(LINES)
def test_hub_rows_and_lines_of_the_raw_file_make_the_same_text(lines: list[str]) -> None:
    raw = "".join(f"{line}\n" for line in lines)
    hub = [f"{line}\n" if line.strip() else "" for line in lines]  # as the hub's script makes rows
    assert lm.stream_text(raw.removesuffix("\n").split("\n")) == lm.stream_text(hub)


def test_blank_lines_are_line_feeds_and_others_stay_as_they_are() -> None:
    assert (
        lm.stream_text([" = T = \n", "", " \n", "one", "two\n\nthree"]) == " = T = \n\n\none\ntwo\n\nthree\n"
    )


@given(st.text(alphabet="ab\n"), st.integers(1, 9))
def test_chunks_make_up_the_stream_and_end_lines(text: str, size: int) -> None:
    made = list(lm.chunks(text, size))
    assert "".join(made) == text
    assert all(len(chunk) >= size and chunk.endswith("\n") for chunk in made[:-1])


@given(LENGTHS, SIZES, st.data())
def test_every_token_but_the_first_is_scored_once(length: int, size: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(1, size - 1))
    made = lm.windows(length, size, step)
    scored = [position for w in made for position in range(w.start + w.context, w.end)]
    assert scored == list(range(1, length))
    for window in made:
        assert 0 <= window.start < window.end <= length
        assert window.end - window.start == min(size, length)  # as much context as a window has room for
        assert window.context >= 1  # the first token of a window has nothing before it
    for window in made[1:-1]:
        assert window.end - window.start - window.context == step


@pytest.mark.parametrize("step", [0, 4, 5])
def test_a_window_that_leaves_no_context_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"windows of 4 tokens can't step by {step}"):
        lm.windows(10, 4, step)


@given(LENGTHS, SIZES)
def test_blocks_follow_each_other_and_only_a_short_end_is_left_out(length: int, size: int) -> None:
    made = lm.blocks(length, size)
    assert [w.start for w in made] == list(range(0, len(made) * size, size))
    assert [w.end - w.start for w in made] == [min(size, length)] * len(made)
    assert length - made[-1].end < size


@pytest.mark.parametrize(("family", "begins"), [("gpt2", False), ("llama", True), ("qwen2", True)])
def test_only_a_tokenizer_that_begins_texts_so_gets_its_begin_token(family: str, begins: bool) -> None:
    _, tokenizer = synthetic.backbone(family, head="causal-lm")
    text = "the cook went to the market .\n"
    found = lm.stream_tokens(text, tokenizer)
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found.dtype == np.int32
    assert found.tolist() == [tokenizer.bos_token_id] * begins + plain
    assert tokenizer.eos_token_id not in found[1:]


def test_text_is_never_read_as_a_special_token() -> None:
    _, tokenizer = synthetic.backbone("llama", head="causal-lm", texts=["a </s> b"])
    found = lm.stream_tokens("a </s> b", tokenizer)
    assert tokenizer.eos_token_id not in found
    assert tokenizer.decode(found[1:]) == "a </s> b"


def test_long_texts_are_tokenised_in_chunks_that_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tokenizer = synthetic.backbone("gpt2", head="causal-lm", texts=["the cook went"] * 9)
    text = "the cook went to the market .\n" * 40
    whole = lm.stream_tokens(text, tokenizer)
    monkeypatch.setattr(lm.chunks, "__defaults__", (50,))
    assert lm.stream_tokens(text, tokenizer).tolist() == whole.tolist()
