"""Granularity: groups, and who is routed by what, against a plain loop over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from torch import Tensor

from camex_ft.moe.context import ForwardState
from camex_ft.moe.routing.router import Grouping, Groups, Router, TokenPositions
from tests.helpers.expert_layers import EXPERTS, HIDDEN, grouped, layer_of, restored, settings, tokens
from tests.helpers.segment_loop import EXACT, by_loop, router

LONGEST = 13


def group(x: Tensor, mask: Tensor | None, route: Router, grouping: Grouping, encoded: Any = None) -> Groups:
    """One full pass."""
    return grouped(x, TokenPositions((x.shape[0], x.shape[1]), mask), route, grouping, None, encoded)


def weights_by_token(groups: Groups) -> Tensor:
    """Routing weights that serve each token, put back in order; [B, L, N]."""
    s = groups.weights
    return restored(
        groups, s if s.dim() == 3 else s.unsqueeze(1).expand(-1, groups.x.shape[1], -1).contiguous()
    )


@st.composite
def masks(draw: st.DrawFn) -> list[list[int]]:
    """Rows with padding on the left, on the right, both, with holes, or nothing but padding."""
    length = draw(st.integers(1, LONGEST))
    return draw(
        st.lists(st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=1, max_size=3)
    )


@effort(max_examples=150, deadline=None)
@given(masks(), st.integers(1, LONGEST + 2), st.sampled_from(["prior", "self"]))
def test_segments_are_those_of_the_loop(mask: list[list[int]], span: int, first: str) -> None:
    grouping, route = Grouping("segment", span, first), router(2)
    x = tokens(len(mask), len(mask[0]))
    groups = group(x, torch.tensor(mask), route, grouping)
    found, back = weights_by_token(groups), restored(groups, groups.x)
    for b, row in enumerate(mask):
        for t, expected in enumerate(by_loop(x[b], row, route, grouping)):
            if expected is not None:
                torch.testing.assert_close(found[b, t], expected, rtol=EXACT, atol=EXACT)
    assert torch.equal(back, x)
    assert torch.isfinite(groups.routing.weights).all()


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_the_last_segment_may_be_short(length: int) -> None:
    grouping, route, x = Grouping("segment", 4), router(), tokens(2, length)
    groups = group(x, None, route, grouping)
    count = -(-length // 4)
    assert groups.routing.weights.shape == (2, count + 1, EXPERTS)  # the prior's, then each segment's own
    assert groups.mask.all()
    found = weights_by_token(groups)
    for b in range(2):
        expected = torch.stack(by_loop(x[b], [1] * length, route, grouping))
        torch.testing.assert_close(found[b], expected, rtol=EXACT, atol=EXACT)


def test_segments_of_padding_do_not_count() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]])
    groups = group(tokens(3, 6), mask, router(), Grouping("segment", 2))
    # the prior first; then the segments from the first token on, so that left padding comes last
    assert groups.mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]


def test_left_padding_moves_segments_along() -> None:
    route, grouping, x = router(), Grouping("segment", 2), tokens(1, 5)
    shifted = torch.cat([torch.full((1, 3, HIDDEN), 7.0).double(), x], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    alone = weights_by_token(group(x, None, route, grouping))
    torch.testing.assert_close(
        weights_by_token(group(shifted, mask, route, grouping))[:, 3:], alone, rtol=EXACT, atol=EXACT
    )


def test_self_passes_no_gradient_to_the_first_segment() -> None:
    route, x = router(), tokens(1, 4).requires_grad_()
    groups = group(x, None, route, Grouping("segment", 2, "self"))
    weights_by_token(groups)[:, :2, 0].sum().backward(retain_graph=True)
    assert x.grad is None or not x.grad.any()
    assert route.gate.grad is None or not route.gate.grad.any()
    weights_by_token(groups)[:, 2:, 0].sum().backward()
    assert x.grad[:, :2].abs().sum() > 0 and not x.grad[:, 2:].any()


@pytest.mark.parametrize(
    ("protocol", "granularity"), [("ties-ca", "segment"), ("ties-ca", "token"), ("smoe", "token")]
)
def test_later_tokens_change_no_earlier_output(protocol: str, granularity: str) -> None:
    layer = layer_of(settings(protocol, grouping=Grouping(granularity, segment=3))).eval()
    x = tokens(1, 8)
    before = layer(x)
    for t in range(8):
        changed = x.clone()
        changed[:, t:] += 1
        after = layer(changed)
        # products of another batch of rows may round differently: float64
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=EXACT, atol=EXACT)
        assert not torch.allclose(after[:, t], before[:, t], atol=1e-3)


def test_self_lets_a_token_see_its_segment() -> None:
    layer = layer_of(settings(grouping=Grouping("segment", 3, "self"))).eval()
    x = tokens(1, 6)
    changed = x.clone()
    changed[:, 2] += 1
    assert not torch.allclose(layer(changed)[:, 0], layer(x)[:, 0], atol=1e-6)


def test_sequence_is_routed_by_the_mean_of_its_tokens() -> None:
    route, x = router(), tokens(2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    groups = group(x, mask, route, Grouping("sequence"))
    expected = torch.stack([route(x[0, :3].mean(0)).weights, route(x[1, 1:].mean(0)).weights])
    torch.testing.assert_close(groups.weights, expected, rtol=EXACT, atol=EXACT)
    assert groups.mask is None and torch.equal(restored(groups, x), x)


def test_token_is_routed_by_itself() -> None:
    route, x, mask = router(2), tokens(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    groups = group(x, mask, route, Grouping("token"))
    assert groups.mask is mask
    for b in range(2):
        for t in range(5):
            torch.testing.assert_close(groups.weights[b, t], route(x[b, t]).weights, rtol=EXACT, atol=EXACT)


def test_encoder_serves_a_decoder() -> None:
    route, x, encoded = router(), tokens(2, 5), tokens(1, 2)[0]
    groups = group(x, None, route, Grouping("encoder"), encoded)
    torch.testing.assert_close(groups.weights, route(encoded).weights, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="no encoder output"):
        group(x, None, route, Grouping("encoder"))


def test_padding_changes_no_output_of_a_layer() -> None:
    layer = layer_of(settings("ties-ca", grouping=Grouping("segment", 3))).eval()
    x = tokens(1, 5)
    padded = torch.cat([x, torch.full((1, 4, HIDDEN), 3.0).double()], dim=1)
    with layer.context.open(ForwardState(masks={"encoder": torch.tensor([[1] * 5 + [0] * 4])})):
        found = layer(padded)[:, :5]
    torch.testing.assert_close(found, layer(x), rtol=EXACT, atol=EXACT)
