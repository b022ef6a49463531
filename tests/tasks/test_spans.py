"""Where answers are in their context, and which faults are found."""

import re

import pytest

from camex_ft.tasks.spans import fault, place

CONTEXT = "Anna met Bob  in\nRome. Rome was hot."


@pytest.mark.parametrize(
    ("text", "start", "cut"),
    [
        ("Rome", 17, "Rome"),
        ("Rome", 23, "Rome"),
        (" Rome", 16, "Rome"),  # a blank before it
        ("Rome ", 17, "Rome"),  # a blank behind it
        (" Bob", 9, "Bob"),  # a blank in the answer that the position leaves out
        ("Bob", 8, "Bob"),  # and the other way round
        ("Bob in Rome", 9, "Bob  in\nRome"),  # other blanks inside
        ("Rome.", 17, "Rome."),
    ],
)
def test_an_answer_is_found_with_its_blanks_or_without(text, start, cut):
    found = place(CONTEXT, text, start)
    assert found is not None
    assert CONTEXT[slice(*found)] == cut


@pytest.mark.parametrize(
    ("text", "start"),
    [("Rome", 18), ("rome", 17), ("Rome", -1), ("Rome", 99), ("", 0), (" ", 8), ("R.me", 17)],
)
def test_an_answer_is_not_found_elsewhere(text, start):
    assert place(CONTEXT, text, start) is None


def example(*answers, context=CONTEXT):
    golds = {"text": [text for text, _ in answers], "answer_start": [start for _, start in answers]}
    return {"context": context, "answers": golds}


def test_what_real_data_holds_is_no_fault():
    assert fault(example()) is None
    assert fault(example(("Rome", 17), ("Rome", 17), (" Rome ", 22))) is None  # twice the same, blanks around


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            example(("Rome", 18)),
            r"answer 'Rome': answer_start is 18, where the context \(36 characters\) has 'ome.'",
        ),
        (example(("Rome", 18)), "it is at 17"),
        (example(("Paris", 0)), "has 'Anna '; expected .* it is nowhere in the context"),
        (example(("Rome", 17), (" ", 3)), "a blank text"),
        (example(("Rome", 99)), "answer_start is 99"),
        (example(context=" \n"), "'context' is blank"),
        ({"context": "x", "answers": {"text": ["x"], "answer_start": []}}, "1 texts and 0 of answer_start"),
    ],
)
def test_faults_say_what_was_expected(row, message):
    found = fault(row)
    assert found is not None
    assert re.search(message, found), found
