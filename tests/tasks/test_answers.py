"""Answers: their scores against the definition, generation that ends, and the choice among windows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camex_ft.synthetic import backbone
from camex_ft.tasks import answers

MODEL, TOKENIZER = backbone("t5", head="seq2seq-lm", seed=3)
END = TOKENIZER.eos_token_id


def batch(*texts):
    return dict(TOKENIZER(list(texts), padding=True, return_tensors="pt"))


INPUTS = batch("who gave the saw ?", "the cook gave the saw to the baker on monday .")


# -- targets and scores -----------------------------------------------------------------------------------------------


def test_a_long_target_loses_its_last_tokens_and_keeps_the_end_token():
    whole = answers.target("the cook gave the saw", TOKENIZER, 32)
    assert TOKENIZER.decode(whole) == "the cook gave the saw </s>"
    assert answers.target("the cook gave the saw", TOKENIZER, 6) == whole
    assert answers.target("the cook gave the saw", TOKENIZER, 3) == [*whole[:2], END]
    assert answers.target("the cook", TOKENIZER, 1) == [END]


@torch.no_grad()
def test_a_score_is_the_sum_of_log_probabilities_token_by_token():
    labels = torch.tensor([[7, 9, END, -100], [11, END, -100, -100]])
    found = answers.log_probabilities(MODEL, INPUTS, labels)
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
    short = answers.log_probabilities(MODEL, batch("who gave it ?"), torch.tensor([[7, END]]))
    padded = answers.log_probabilities(
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
    total = answers.log_probabilities(MODEL, inputs, labels).exp().sum()
    assert 0 < float(total) < 1


def test_repeated_is_one_row_an_input():
    assert answers.repeated([4, END], INPUTS).tolist() == [[4, END]] * 2


# -- generation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("length", [2, 6])
def test_a_generated_answer_has_one_end_token_within_its_length(beams, length):
    made = answers.generate(MODEL, INPUTS, TOKENIZER, length=length, beams=beams)
    assert made.shape[1] <= length
    for row in made.tolist():
        assert row.count(END) == 1
        assert set(row[row.index(END) + 1 :]) <= {-100}
        assert -100 not in row[: row.index(END)]


@torch.no_grad()
def test_greedy_takes_the_likeliest_token_of_every_step():
    made = answers.generate(MODEL, INPUTS, TOKENIZER, length=5, beams=1)
    logits = MODEL(**INPUTS, labels=made).logits
    for row, ids in enumerate(made.tolist()):
        for step, token in enumerate(ids[: min(ids.index(END) + 1, 4)]):  # the fifth is the end token, forced
            assert token == int(logits[row, step].argmax())


@torch.no_grad()
def test_more_beams_find_an_answer_at_least_as_likely():
    scores = [
        answers.log_probabilities(
            MODEL, INPUTS, answers.generate(MODEL, INPUTS, TOKENIZER, length=3, beams=n)
        )
        for n in (1, len(TOKENIZER))
    ]
    assert bool((scores[1] >= scores[0] - 1e-4).all())


# -- texts ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=8), min_size=1, max_size=5))
@settings(deadline=None)
def test_texts_survive_as_bytes_and_further_padding(texts):
    made = answers.as_bytes(texts)
    assert made.shape[0] == len(texts)
    padded = np.pad(made.numpy(), ((0, 0), (0, 3)), constant_values=-100)
    assert answers.as_texts(made.numpy()) == answers.as_texts(padded) == texts


@pytest.mark.parametrize("text", ["", "  ", "no answer", " no  answer "])
def test_what_says_that_there_is_no_answer(text):
    assert answers.spoken(text) == ""


@pytest.mark.parametrize(
    "text",
    ["The Cook", "A", "the", "$", "...", "an A", "no answers", "No Answer", "no answer.", "the no answer"],
)
def test_an_answer_is_kept_as_it_is_written(text):
    """Articles, punctuation and case are left out in scoring alone."""
    assert answers.spoken(f" {text} ") == text


# -- the choice -------------------------------------------------------------------------------------------------------


def choose(*windows, none=None, count=1):
    texts, scores, origin = zip(*windows, strict=True)
    return answers.choose(
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
