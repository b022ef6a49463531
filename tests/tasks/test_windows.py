"""Windows of a context: nothing is lost, neighbours share what was asked for, and what does not fit is said."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camex_ft.synthetic import backbone
from camex_ft.tasks.windows import Layout, Window, Windows
from camex_ft.utils.errors import UserError

_, TOKENIZER = backbone("t5", head="seq2seq-lm")
FIXED = 5  # "question", ":", "context", ":" and the end token
WORDS = ["saw", "drill", "the", "gave", "cook", "monday"]


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def body(window, question):
    """The tokens of a window's context."""
    head = ids(f"question: {question} context:")
    assert window.input_ids[: len(head)] == head
    assert window.input_ids[-1] == TOKENIZER.eos_token_id
    return window.input_ids[len(head) : -1]


@given(
    words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=60),
    asked=st.integers(1, 8),
    stride=st.integers(1, 9),
    room=st.integers(20, 40),
)
@settings(max_examples=60, deadline=None)
def test_windows_cover_the_context_and_neighbours_share_doc_stride_tokens(words, asked, stride, room):
    question, context = " ".join(["who"] * asked), "  ".join(words)
    windows = Windows(TOKENIZER, max_length=room + FIXED, doc_stride=stride).cut(question, context)
    parts = [body(window, question) for window in windows]
    whole = parts[0]
    for left, right in pairwise(parts):
        assert left[-stride:] == right[:stride]
        whole = whole + right[stride:]
    assert whole == ids(context)
    assert all(len(part) == room - asked for part in parts[:-1])
    assert stride < len(parts[-1]) <= room - asked or len(parts) == 1
    for window, part in zip(windows, parts, strict=True):
        assert ids(context[window.start : window.end]) == part
    assert (windows[0].start, windows[-1].end) == (0, len(context))


def test_a_context_that_fits_is_one_window():
    (window,) = Windows(TOKENIZER, max_length=64, doc_stride=4).cut(
        "who gave it?", " the cook gave the saw. "
    )
    assert (window.start, window.end) == (0, len(" the cook gave the saw. "))
    expected = "question : who gave it ? context : the cook gave the saw . </s>"
    assert TOKENIZER.decode(window.input_ids) == expected


def test_a_long_question_keeps_its_first_tokens_and_leaves_half_of_the_room():
    question = "who gave the saw " + "on monday " * 50
    windows = Windows(TOKENIZER, max_length=40 + FIXED, doc_stride=4).cut(question, "saw " * 30)
    assert len(windows) == 2
    assert all(len(body(window, " ".join(question.split()[:20]))) <= 20 for window in windows)


def test_an_empty_context_is_one_window_without_context():
    (window,) = Windows(TOKENIZER, max_length=64, doc_stride=4).cut("who?", "")
    assert body(window, "who?") == []


def test_special_tokens_in_a_text_are_text():
    (window,) = Windows(TOKENIZER, max_length=64, doc_stride=4).cut("who </s> ?", "the cook </s> gave")
    assert window.input_ids.count(TOKENIZER.eos_token_id) == 1


@pytest.mark.parametrize("stride", [16, 17, 400])
def test_a_doc_stride_that_leaves_no_step_is_an_error_that_says_the_limit(stride):
    with pytest.raises(UserError, match=f"task.doc_stride is {stride}.* below 16"):
        Windows(TOKENIZER, max_length=32 + FIXED, doc_stride=stride)
    Windows(TOKENIZER, max_length=32 + FIXED, doc_stride=15)


def test_a_max_length_without_room_is_an_error_that_says_the_least():
    with pytest.raises(UserError, match=r"task.max_length is 20, which leaves 15 .* at least 21"):
        Windows(TOKENIZER, max_length=20, doc_stride=1)
    Windows(TOKENIZER, max_length=21, doc_stride=1)


def test_a_slow_tokenizer_is_refused(monkeypatch):
    monkeypatch.setattr(type(TOKENIZER), "is_fast", False)
    with pytest.raises(UserError, match="needs a fast tokenizer"):
        Windows(TOKENIZER, max_length=64, doc_stride=4)


def test_what_a_window_holds_and_touches():
    window = Window([], 10, 20)
    assert window.holds(10, 20)
    assert not window.holds(9, 12)
    assert not window.holds(18, 21)
    assert window.touches(9, 11)
    assert window.touches(19, 25)
    assert not window.touches(5, 10)
    assert not window.touches(20, 25)


def test_a_layout_gives_each_text_before_the_last_at_most_half_of_what_is_left():
    layout = Layout(TOKENIZER, ("question:", "title:", "answer:"), max_length=32 + 7)
    assert layout.room == 32
    made = layout.fit(["who " * 40, "saw " * 40, "cook " * 40])
    assert len(made) == 39
    assert [made.count(ids(word)[0]) for word in ("who", "saw", "cook")] == [16, 8, 8]
    short = layout.fit(["who", "saw", "cook " * 40])
    assert short.count(ids("cook")[0]) == 30
    assert (
        TOKENIZER.decode(layout.fit(["who?", "saw", "cook"]))
        == "question : who ? title : saw answer : cook </s>"
    )
