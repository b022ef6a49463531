"""The stream of a split: the same text from rows and from the raw file, windows that score each token once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from camex_ft import synthetic
from camex_ft.tasks import stream

LINES = st.lists(st.text(alphabet="ab =\t\u2028é"), min_size=1)
LENGTHS, SIZES = st.integers(1, 400), st.integers(2, 60)


@given(LINES)
def test_hub_rows_and_lines_of_the_raw_file_make_the_same_text(lines: list[str]) -> None:
    raw = "".join(f"{line}\n" for line in lines)
    hub = [f"{line}\n" if line.strip() else "" for line in lines]  # as the hub's script makes rows
    assert stream.text(raw.removesuffix("\n").split("\n")) == stream.text(hub)


def test_blank_lines_are_line_feeds_and_others_stay_as_they_are() -> None:
    assert stream.text([" = T = \n", "", " \n", "one", "two\n\nthree"]) == " = T = \n\n\none\ntwo\n\nthree\n"


@given(st.text(alphabet="ab\n"), st.integers(1, 9))
def test_chunks_make_up_the_stream_and_end_lines(text: str, size: int) -> None:
    made = list(stream.chunks(text, size))
    assert "".join(made) == text
    assert all(len(chunk) >= size and chunk.endswith("\n") for chunk in made[:-1])


@given(LENGTHS, SIZES, st.data())
def test_every_token_but_the_first_is_scored_once(length: int, size: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(1, size - 1))
    made = stream.windows(length, size, step)
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
        stream.windows(10, 4, step)


@given(LENGTHS, SIZES)
def test_blocks_follow_each_other_and_only_a_short_end_is_left_out(length: int, size: int) -> None:
    made = stream.blocks(length, size)
    assert [w.start for w in made] == list(range(0, len(made) * size, size))
    assert [w.end - w.start for w in made] == [min(size, length)] * len(made)
    assert length - made[-1].end < size


@pytest.mark.parametrize(("family", "begins"), [("gpt2", False), ("llama", True), ("qwen2", True)])
def test_only_a_tokenizer_that_begins_texts_so_gets_its_begin_token(family: str, begins: bool) -> None:
    _, tokenizer = synthetic.backbone(family, head="causal-lm")
    text = "the cook went to the market .\n"
    found = stream.tokens(text, tokenizer)
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found.dtype == np.int32
    assert found.tolist() == [tokenizer.bos_token_id] * begins + plain
    assert tokenizer.eos_token_id not in found[1:]


def test_text_is_never_read_as_a_special_token() -> None:
    _, tokenizer = synthetic.backbone("llama", head="causal-lm", texts=["a </s> b"])
    found = stream.tokens("a </s> b", tokenizer)
    assert tokenizer.eos_token_id not in found
    assert tokenizer.decode(found[1:]) == "a </s> b"


def test_long_texts_are_tokenised_in_chunks_that_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tokenizer = synthetic.backbone("gpt2", head="causal-lm", texts=["the cook went"] * 9)
    text = "the cook went to the market .\n" * 40
    whole = stream.tokens(text, tokenizer)
    monkeypatch.setattr(stream.chunks, "__defaults__", (50,))
    assert stream.tokens(text, tokenizer).tolist() == whole.tolist()
