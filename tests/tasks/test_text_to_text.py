"""Text to text: windows of a context, layouts that fit, and answers that are generated, scored and chosen."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camex_ft.synthetic import backbone
from camex_ft.tasks import text_to_text
from camex_ft.tasks.text_to_text import PromptLayout, Window, Windows
from camex_ft.utils.errors import UserError

MODEL, TOKENIZER = backbone("t5", head="seq2seq-lm", seed=3)
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
    layout = PromptLayout(TOKENIZER, ("question:", "title:", "answer:"), max_length=32 + 7)
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


END = TOKENIZER.eos_token_id


def batch(*texts):
    return dict(TOKENIZER(list(texts), padding=True, return_tensors="pt"))


INPUTS = batch("who gave the saw ?", "the cook gave the saw to the baker on monday .")


# -- targets and scores -----------------------------------------------------------------------------------------------


def test_a_long_target_loses_its_last_tokens_and_keeps_the_end_token():
    whole = text_to_text.target_tokens("the cook gave the saw", TOKENIZER, 32)
    assert TOKENIZER.decode(whole) == "the cook gave the saw </s>"
    assert text_to_text.target_tokens("the cook gave the saw", TOKENIZER, 6) == whole
    assert text_to_text.target_tokens("the cook gave the saw", TOKENIZER, 3) == [*whole[:2], END]
    assert text_to_text.target_tokens("the cook", TOKENIZER, 1) == [END]


@torch.no_grad()
def test_a_score_is_the_sum_of_log_probabilities_token_by_token():
    labels = torch.tensor([[7, 9, END, -100], [11, END, -100, -100]])
    found = text_to_text.log_probabilities(MODEL, INPUTS, labels)
    for row, ids in enumerate(([7, 9, END], [11, END])):
        one = {name: values[row : row + 1] for name, values in INPUTS.items()}
        given, total = [MODEL.config.decoder_start_token_id], 0.0
        for token in ids:
            logits = MODEL(**one, decoder_input_ids=torch.tensor([given])).logits[0, -1]
            total += float(logits.log_softmax(-1)[token])
            given.append(token)
        assert float(found[row]) == pytest.approx(total, abs=1e-4)  # float32, some logits of size 10


@torch.no_grad()
def test_a_score_does_not_depend_on_padding():
    short = text_to_text.log_probabilities(MODEL, batch("who gave it ?"), torch.tensor([[7, END]]))
    padded = text_to_text.log_probabilities(
        MODEL,
        batch("who gave it ?", "the cook gave the saw to the baker ."),
        torch.tensor([[7, END, -100]] * 2),
    )
    torch.testing.assert_close(padded[:1], short, atol=1e-4, rtol=0)


@torch.no_grad()
def test_probabilities_of_all_one_token_answers_are_at_most_one():
    rows = len(TOKENIZER)
    inputs = {name: values[:1].repeat(rows, 1) for name, values in INPUTS.items()}
    labels = torch.stack([torch.arange(rows), torch.full((rows,), END)], dim=1)
    total = text_to_text.log_probabilities(MODEL, inputs, labels).exp().sum()
    assert 0 < float(total) < 1


def test_repeated_is_one_row_an_input():
    assert text_to_text.repeat_labels([4, END], INPUTS).tolist() == [[4, END]] * 2


# -- generation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("length", [2, 6])
def test_a_generated_answer_has_one_end_token_within_its_length(beams, length):
    made = text_to_text.generate_answers(MODEL, INPUTS, TOKENIZER, length=length, beams=beams)
    assert made.shape[1] <= length
    for row in made.tolist():
        assert row.count(END) == 1
        assert set(row[row.index(END) + 1 :]) <= {-100}
        assert -100 not in row[: row.index(END)]


@torch.no_grad()
def test_greedy_takes_the_likeliest_token_of_every_step():
    made = text_to_text.generate_answers(MODEL, INPUTS, TOKENIZER, length=5, beams=1)
    logits = MODEL(**INPUTS, labels=made).logits
    for row, ids in enumerate(made.tolist()):
        for step, token in enumerate(ids[: min(ids.index(END) + 1, 4)]):  # the fifth is the end token, forced
            assert token == int(logits[row, step].argmax())


@torch.no_grad()
def test_more_beams_find_an_answer_at_least_as_likely():
    scores = [
        text_to_text.log_probabilities(
            MODEL, INPUTS, text_to_text.generate_answers(MODEL, INPUTS, TOKENIZER, length=3, beams=n)
        )
        for n in (1, len(TOKENIZER))
    ]
    assert bool((scores[1] >= scores[0] - 1e-4).all())


# -- texts ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=8), min_size=1, max_size=5))
@settings(deadline=None)
def test_texts_survive_as_bytes_and_further_padding(texts):
    made = text_to_text.encode_texts(texts)
    assert made.shape[0] == len(texts)
    padded = np.pad(made.numpy(), ((0, 0), (0, 3)), constant_values=-100)
    assert text_to_text.decode_texts(made.numpy()) == text_to_text.decode_texts(padded) == texts


@pytest.mark.parametrize("text", ["", "  ", "no answer", " no  answer "])
def test_what_says_that_there_is_no_answer(text):
    assert text_to_text.as_answer(text) == ""


@pytest.mark.parametrize(
    "text",
    ["The Cook", "A", "the", "$", "...", "an A", "no answers", "No Answer", "no answer.", "the no answer"],
)
def test_an_answer_is_kept_as_it_is_written(text):
    """Articles, punctuation and case are left out in scoring alone."""
    assert text_to_text.as_answer(f" {text} ") == text


# -- the choice -------------------------------------------------------------------------------------------------------


def choose(*windows, none=None, count=1):
    texts, scores, origin = zip(*windows, strict=True)
    return text_to_text.choose_answers(
        texts,
        np.array(scores),
        np.array(origin),
        count,
        none_scores=None if none is None else np.array(none),
    )


def test_the_likeliest_answer_of_an_examples_windows_wins():
    assert choose(("saw", -2.0, 0), ("drill", -1.0, 0), ("lathe", -3.0, 0)) == ["drill"]
    assert choose(("saw", -1.0, 0), ("drill", -1.0, 0)) == ["saw"]  # the first among equals


def test_examples_do_not_meet():
    assert choose(("saw", -2.0, 1), ("drill", -1.0, 0), ("", -0.1, 1), count=3) == ["drill", "saw", ""]


def test_where_every_question_has_an_answer_a_window_without_one_never_wins():
    assert choose(("", -0.01, 0), ("saw", -9.0, 0), ("", -0.01, 0)) == ["saw"]
    assert choose(("", -0.01, 0), ("", -0.1, 0)) == [""]


def test_an_impossible_answer_is_still_an_answer():
    assert choose(("saw", -np.inf, 0)) == ["saw"]


def test_no_answer_wins_where_it_is_likelier_in_every_window():
    assert choose(("saw", -2.0, 0), ("", -0.1, 0), none=[-1.0, -0.1]) == [""]
    assert choose(("saw", -2.0, 0), ("", -0.1, 0), none=[-3.0, -0.1]) == ["saw"]  # the first window doubts
    assert choose(("saw", -2.0, 0), none=[-2.0]) == ["saw"]  # an answer wins among equals
    assert choose(("", -5.0, 0), ("", -5.0, 0), none=[-9.0, -9.0]) == [""]  # none says anything
