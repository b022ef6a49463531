"""Shortening keeps the words nearest to the spans."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camex_ft.tasks.shorten import keep_spans


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
    assert keep_spans(TEXT, [span(TEXT, "* four *")], room, words) == expected


def test_both_spans_stay_when_they_are_far_apart():
    text = "* Ann * " + "and so on " * 20 + "# she # left"
    shorter = keep_spans(text, [span(text, "* Ann *"), span(text, "# she #")], 8, words)
    assert shorter == "* Ann * and on # she #"


def test_without_spans_the_beginning_stays():
    assert keep_spans("a b c d", [], 2, words) == "a b"


def test_a_text_that_fits_keeps_its_blanks():
    assert keep_spans("a  b\nc", [[0, 1]], 3, words) == "a  b\nc"


@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), min_size=1, max_size=30), st.data())
def test_as_much_as_fits_in_order(pieces, data):
    text = " ".join(pieces)
    start = data.draw(st.integers(0, len(text) - 1))
    room = data.draw(st.integers(0, 40))
    shorter = keep_spans(text, [[start, start + 1]], room, words)
    assert words(shorter) == min(room, len(pieces))
    rest = iter(pieces)
    assert all(word in rest for word in shorter.split())  # a subsequence
