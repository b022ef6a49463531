"""Segments in pieces and in packed rows: every token is served as in a plain loop over its own document."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from torch import Tensor

from camex_ft.moe.routing.router import Grouping, Groups, Router, TokenPositions
from camex_ft.moe.routing.router_state import RouterState
from tests.helpers.expert_layers import HIDDEN, grouped, restored, tokens
from tests.helpers.segment_loop import EXACT, by_loop, router


class Reader:
    """One layer that reads rows piece by piece, as with a key-value cache."""

    def __init__(self, route: Router, grouping: Grouping) -> None:
        self.route, self.grouping, self.state = route, grouping, RouterState(self)

    def read(self, x: Tensor, mask: Tensor | None) -> Groups:
        going_on = self.state if self.state.layers else None
        before = () if going_on is None else going_on.counts
        positions = TokenPositions.of((x.shape[0], x.shape[1]), mask, before=before, resumable=True)
        known = self.state.layers.get("layer")
        made = grouped(x, positions, self.route, self.grouping, known)
        assert made.state is not None
        real = (
            torch.ones(positions.shape, dtype=torch.bool) if positions.mask is None else positions.mask != 0
        )
        self.state.advance(real, positions.after, {"layer": made.state})
        return made


def served(groups: Groups) -> Tensor:
    """Routing weights that serve each token, in the order in which they came; [B, L, N]."""
    s = groups.weights
    return restored(groups, s.unsqueeze(1).expand(-1, groups.x.shape[1], -1).contiguous())


@st.composite
def readings(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Rows with padding anywhere, and the lengths of the pieces in which they are read."""
    pieces = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    row = st.lists(st.integers(0, 1), min_size=sum(pieces), max_size=sum(pieces))
    return draw(st.lists(row, min_size=1, max_size=3)), pieces


@effort(max_examples=200, deadline=None)
@given(readings(), st.integers(1, 5), st.booleans())
def test_pieces_are_served_as_the_whole(
    reading: tuple[list[list[int]], list[int]], size: int, grad: bool
) -> None:
    rows, pieces = reading
    grouping, route = Grouping("segment", size), router(2)
    x, mask = tokens(len(rows), len(rows[0])), torch.tensor(rows)
    with torch.set_grad_enabled(grad):
        reader, found, start = Reader(route, grouping), [], 0
        for length in pieces:
            part = slice(start, start + length)
            made = reader.read(x[:, part], mask[:, part])
            torch.testing.assert_close(restored(made, made.x), x[:, part], rtol=0, atol=0)
            found.append(served(made))
            start += length
    weights = torch.cat(found, dim=1)
    for b, row in enumerate(rows):
        for t, expected in enumerate(by_loop(x[b], row, route, grouping)):
            if expected is not None:
                torch.testing.assert_close(weights[b, t], expected, rtol=EXACT, atol=EXACT)


@effort(max_examples=100, deadline=None)
@given(readings(), st.integers(1, 5), st.data())
def test_tokens_that_were_taken_back_leave_no_trace(
    reading: tuple[list[list[int]], list[int]], size: int, data: Any
) -> None:
    """As in assisted generation: wrong guesses, up to a segment long, are read and taken back at every piece."""
    rows, pieces = reading
    grouping, route = Grouping("segment", size), router(2)
    x, mask = tokens(len(rows), len(rows[0])), torch.tensor(rows)
    wrong = tokens(len(rows), size, seed=9)
    with torch.no_grad():
        reader, straight, start = Reader(route, grouping), Reader(route, grouping), 0
        for length in pieces:
            part = slice(start, start + length)
            expected = served(straight.read(x[:, part], mask[:, part]))
            torch.testing.assert_close(
                served(reader.read(x[:, part], mask[:, part])), expected, rtol=EXACT, atol=EXACT
            )
            guesses = data.draw(st.integers(1, size))
            reader.read(wrong[:, :guesses], None)
            reader.state.crop(guesses)
            start += length
    assert reader.state.counts == straight.state.counts


def test_more_tokens_than_are_remembered_cannot_be_taken_back() -> None:
    reader = Reader(router(), Grouping("segment", 4))
    with torch.no_grad():
        reader.read(tokens(1, 19), None)
        with pytest.raises(RuntimeError, match="last two segments of 4 tokens"):
            reader.state.crop(9)  # 10 are left: the third segment began with 2, of which nothing is known
        reader.state.crop(3)  # 16 are left: a segment is full
        assert reader.state.counts == (16,)


def test_rows_follow_their_beams() -> None:
    route, grouping, x = router(), Grouping("segment", 3), tokens(3, 8)
    rows = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        reader, alone = Reader(route, grouping), Reader(route, grouping)
        reader.read(x[:, :5], torch.tensor([[0, 1, 1, 1, 1], [1] * 5, [0, 0, 0, 1, 1]]))
        reader.state.select(rows)
        alone.read(x[rows, :5], torch.tensor([[0, 1, 1, 1, 1], [1] * 5, [0, 0, 0, 1, 1]])[rows])
        for t in range(5, 8):
            for one, other in ((reader, alone),):
                expected = served(other.read(x[rows, t : t + 1], None))
                torch.testing.assert_close(
                    served(one.read(x[rows, t : t + 1], None)), expected, rtol=EXACT, atol=EXACT
                )


def test_a_copy_goes_on_by_itself() -> None:
    route, grouping, x = router(), Grouping("segment", 4), tokens(2, 9)
    with torch.no_grad():
        reader = Reader(route, grouping)
        reader.read(x[:, :5], None)
        reader.read(x[:, 5:6], None)
        twin = Reader(route, grouping)
        twin.state = copy.deepcopy(reader.state)
        assert twin.state.owner is reader
        for t in (6, 7):
            twin.read(100 * x[:, t : t + 1], None)
            reader.read(x[:, t : t + 1], None)
        straight = Reader(route, grouping)
        straight.read(x[:, :8], None)
        found, expected = (served(r.read(x[:, 8:], None)) for r in (reader, straight))
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


def test_a_first_segment_that_routes_itself_cannot_go_on() -> None:
    """Its later tokens would have served the earlier ones."""
    grouping, x = Grouping("segment", 4, "self"), tokens(1, 9)
    with torch.no_grad():
        reader = Reader(router(), grouping)
        reader.read(x[:, :3], None)
        with pytest.raises(RuntimeError, match="at least 4 tokens, use_cache=False or prior"):
            reader.read(x[:, 3:4], None)
        whole, pieces = Reader(router(), grouping), Reader(router(), grouping)
        expected = served(whole.read(x, None))
        found = torch.cat([served(pieces.read(x[:, part], None)) for part in (slice(0, 4), slice(4, 9))], 1)
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


# -- packed documents


@effort(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(1, 5),
    st.sampled_from(["prior", "self"]),
)
def test_packed_documents_are_served_as_alone(lengths: list[int], size: int, first: Any) -> None:
    grouping, route = Grouping("segment", size, first), router(2)
    x = tokens(2, sum(lengths))
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).repeat(2, 1)
    made = grouped(x, TokenPositions((2, sum(lengths)), documents=documents), route, grouping)
    assert torch.equal(restored(made, made.x), x)
    assert len(made.x) == 2 * sum(-(-n // size) for n in lengths)  # no group without a token
    weights = served(made)
    for b in range(2):
        start = 0
        for n in lengths:
            expected = by_loop(x[b, start : start + n], [1] * n, route, grouping)
            torch.testing.assert_close(
                weights[b, start : start + n], torch.stack(expected), rtol=EXACT, atol=EXACT
            )
            start += n


def test_packed_documents_count_in_the_balance_as_alone() -> None:
    route, grouping, x = router(), Grouping("segment", 2), tokens(1, 7)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    packed = grouped(x, TokenPositions((1, 7), documents=documents), route, grouping)
    assert packed.mask.tolist() == [[1, 1, 1], [1, 1, 1]]
    alone = grouped(x[:, 3:], TokenPositions((1, 4)), route, grouping)
    torch.testing.assert_close(packed.routing.weights[1:], alone.routing.weights, rtol=EXACT, atol=EXACT)


def test_gradients_flow_through_a_cache() -> None:
    """With gradients on, what is remembered keeps its graph, so that two pieces learn as one."""
    grouping, x = Grouping("segment", 3), tokens(2, 9)

    def grad(pieces: list[int]) -> Tensor:
        inputs = x.clone().requires_grad_()
        reader, start, total = Reader(router(), grouping), 0, torch.zeros(()).double()
        for length in pieces:
            made = served(reader.read(inputs[:, start : start + length], None))
            total = total + (made[..., 0] * torch.arange(start, start + length)).sum()
            start += length
        total.backward()
        assert inputs.grad is not None
        return inputs.grad

    assert x.shape[2] == HIDDEN
    torch.testing.assert_close(grad([4, 1, 1, 1, 2]), grad([9]), rtol=EXACT, atol=EXACT)
