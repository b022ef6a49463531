"""WiC and WSC: where the marks go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camex_ft.tasks.superglue_spans import mark, span_of


def test_wic_marks_the_word_in_both_sentences(rows):
    row = rows("superglue/wic")[0]
    assert row["text"] == "The * bank * is shut."
    assert row["text_pair"] == "A river * bank *."
    assert [row["text"][a:b] for a, b in row["marked"]] == ["* bank *"]
    assert [row["text_pair"][a:b] for a, b in row["marked_pair"]] == ["* bank *"]


def test_wsc_marks_noun_and_pronoun(rows):
    row = rows("superglue/wsc")[0]
    assert row["text"] == "* Ann * told Eve that # she # won."
    assert row["text_pair"] is None
    assert [row["text"][a:b] for a, b in row["marked"]] == ["* Ann *", "# she #"]


def test_wsc_pronoun_before_noun(rows):
    row = rows("superglue/wsc", span1_index=4, span1_text="she", span2_index=0, span2_text="Ann")[0]
    assert row["text"] == "# Ann # told Eve that * she * won."
    assert [row["text"][a:b] for a, b in row["marked"]] == ["* she *", "# Ann #"]


@pytest.mark.parametrize(
    ("text", "index", "span", "found"),
    [
        ("Ann saw Mr. Moncrieff today", 2, "Mr. Moncrieff", "Mr. Moncrieff"),
        ("He met him.", 2, "him", "him"),  # punctuation is no part of the span
        ("Edward's hat", 0, "Edward", "Edward"),
        ("Her coat is old", 0, "her", "Her"),  # case differs
        ("the  big   dog barks", 1, "big dog", "big   dog"),  # blanks differ: as many words
        ("I like the dogs, really", 2, "the dog", "the dog"),
        ("They said theyscold", 2, "they scold", "theyscold"),  # beyond the text's end
        ("so it goes .", 3, "x", "."),
    ],
)
def test_spans_of_words(text, index, span, found):
    start, end = span_of(text, index, span)
    assert text[start:end] == found


spans = st.text(alphabet="ab *#.", min_size=1, max_size=30).flatmap(
    lambda text: st.tuples(
        st.just(text),
        st.lists(st.tuples(st.integers(0, len(text) - 1), st.integers(1, 5)), min_size=1, max_size=2),
    )
)


@given(spans)
def test_marks_add_only_themselves(drawn):
    text, starts = drawn
    places = [(start, min(start + length, len(text)), "@") for start, length in starts]
    marked, ranges = mark(text, places)
    assert marked.replace("@ ", "").replace(" @", "") == text
    for (start, end, _), (low, high) in zip(places, ranges, strict=True):
        piece = marked[low:high]
        assert piece.startswith("@ ") and piece.endswith(" @")
        assert piece.replace("@ ", "").replace(" @", "") == text[start:end]
