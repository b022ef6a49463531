"""One bit a row, there and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camex_ft.results.correctness import pack, unpack


@given(st.lists(st.booleans(), max_size=40))
def test_what_is_packed_comes_back(bits: list[bool]) -> None:
    assert unpack(pack(bits)).tolist() == bits


def test_as_text() -> None:
    assert pack([True, False, True]) == "3:a0"


def test_text_that_holds_too_few_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="8 bits for 9 rows"):
        unpack("9:ff")
