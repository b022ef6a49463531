"""Merged experts that are kept: which rows share one, when one is made, and what they compute."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from camex_ft.moe.context import ForwardState
from camex_ft.moe.layers.ffn import ExpertFFN
from camex_ft.moe.merging.caching import CachedExperts, Map, ParameterCache, merge_cached
from camex_ft.moe.routing.router import Grouping
from camex_ft.moe.routing.router_state import RouterState
from camex_ft.utils.registry import PROTOCOLS
from tests.helpers.expert_layers import EXPERTS, HIDDEN, layer_of, settings, tokens

EXACT = 1e-12  # float64, sums of a dozen terms
MERGING = [n for n in PROTOCOLS.names() if PROTOCOLS.get(n).form == "weights"]
ONE, TWO, THREE = ([1.0, 0.0], [0.5, 0.5], [0.25, 0.75])


class Maker:
    """Makes maps [HIDDEN, HIDDEN] from routing weights, and counts."""

    def __init__(self) -> None:
        self.made: list[list[float]] = []

    def __call__(self, weights: Tensor) -> dict[str, Map]:
        self.made += weights.tolist()
        weight = (
            weights[:, :1, None] * torch.eye(HIDDEN).double() + weights[:, 1:, None]
        )  # [n, HIDDEN, HIDDEN]
        return {"up": (weight, weights[:, 1:].expand(-1, HIDDEN).contiguous())}


def kept_for(
    rows: list[list[float]], before: CachedExperts | None = None, most: int = 9
) -> tuple[CachedExperts, Maker]:
    maker = Maker()
    found = merge_cached(torch.tensor(rows).double(), before, maker, most=most, dtype=torch.float64)
    return found, maker


@pytest.mark.parametrize(
    "rows",
    [[ONE] * 4, [ONE, TWO, ONE, TWO], [ONE, TWO, THREE], [TWO, ONE, ONE], [ONE, TWO, THREE, ONE, TWO]],
    ids=str,
)
def test_every_row_meets_its_own(rows: list[list[float]]) -> None:
    kept, maker = kept_for(rows)
    assert len(maker.made) == len({tuple(row) for row in rows})
    x = tokens(len(rows), 2)
    own = [Maker()(torch.tensor([row]).double())["up"] for row in rows]
    expected = torch.stack([F.linear(x[i], weight[0], bias[0]) for i, (weight, bias) in enumerate(own)])
    torch.testing.assert_close(kept.apply("up", x), expected, rtol=EXACT, atol=EXACT)


def test_what_is_there_is_not_made_again() -> None:
    first, _ = kept_for([ONE, TWO])
    second, maker = kept_for([TWO, THREE], first)
    assert maker.made == [THREE]
    assert (
        second.keys == (tuple(TWO), tuple(THREE)) and len(second.maps["up"][0]) == 2
    )  # what serves nobody goes
    x = tokens(2, 1)
    torch.testing.assert_close(
        second.apply("up", x), kept_for([TWO, THREE])[0].apply("up", x), rtol=0, atol=0
    )
    third, maker = kept_for([THREE, TWO, THREE], second)
    assert not maker.made and third.maps["up"][0] is second.maps["up"][0]
    other, maker = (
        merge_cached(torch.tensor([TWO]), second, (made := Maker()), most=9, dtype=torch.float32),
        made,
    )
    assert maker.made == [TWO] and other.dtype == torch.float32


def test_too_many_different_rows_have_none() -> None:
    kept, maker = kept_for([ONE, TWO, THREE], most=2)
    assert not kept.maps and not maker.made and kept.rows is not None


# -- in a layer


class Reader:
    """A layer of a causal stack that reads token by token."""

    def __init__(self, layer: ExpertFFN) -> None:
        layer.stack = "decoder"
        self.layer, self.state, self.cached = layer, RouterState(self), 0
        self.cache: ParameterCache | None = ParameterCache()

    def __call__(self, x: Tensor) -> Tensor:
        state = self.state if self.cached else None
        current = ForwardState(
            cached=self.cached, resumable=True, router_state=state, parameter_cache=self.cache
        )
        with self.layer.context.open(current):
            y = self.layer(x)
        positions = current.positions("decoder", x)
        real = torch.ones(positions.shape, dtype=torch.bool)
        self.state.advance(real, positions.after, current.new_router_states)
        self.cached += x.shape[1]
        return y

    @property
    def kept(self) -> CachedExperts | None:
        return self.state.layers["layer"].merged


def reader(protocol: str = "ties-ca", **given: Any) -> Reader:
    return Reader(layer_of(settings(protocol, grouping=Grouping("segment", 4), **given), gated=True).eval())


@pytest.mark.parametrize("keep_vectors", [True, False])
@pytest.mark.parametrize("protocol", MERGING)
def test_tokens_by_kept_experts_are_those_of_a_full_pass(protocol: str, keep_vectors: bool) -> None:
    x = tokens(2, 11)
    with torch.no_grad():
        reading = reader(protocol, keep_vectors=keep_vectors, alpha=0.7)
        found = torch.cat([reading(x[:, :3]), *(reading(x[:, t : t + 1]) for t in range(3, 11))], dim=1)
        expected = reader(protocol, alpha=0.7)(x)
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


def test_experts_are_merged_once_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, x, calls = reader(), tokens(2, 14), []
    original = type(reading.layer)._merge
    monkeypatch.setattr(
        type(reading.layer),
        "_merge",
        lambda self, *given: calls.append(reading.cached) or original(self, *given),
    )
    with torch.no_grad():
        reading(x[:, :2])
        assert reading.kept is None and not calls  # a prompt is computed as ever
        for t in range(2, 14):
            reading(x[:, t : t + 1])
    # once for the first segment, whose rows share the prior's, and at the first token of every later one
    assert calls == [2, 4, 8, 12]


def test_training_and_gradients_keep_nothing() -> None:
    for reading, grad in ((reader(), True), (Reader(reader().layer.train()), False)):
        with torch.set_grad_enabled(grad):
            reading(tokens(1, 2))
            reading(tokens(1, 1))
        assert reading.kept is None


@pytest.mark.parametrize("seen", [False, True])
def test_a_change_between_two_tokens_counts(seen: bool) -> None:
    """Within a scope if it counts a version, outside of one in any case."""
    found = []
    for cache in (ParameterCache() if seen else None, None):
        reading, x = reader("ties-ca"), tokens(2, 6)
        reading.cache = cache
        with torch.no_grad():
            reading(x[:, :2]), reading(x[:, 2:3])
            for p in reading.layer.parameters():
                (p if seen else p.data).mul_(0.8)
            found.append(reading(x[:, 3:4]))
    torch.testing.assert_close(found[0], found[1], rtol=EXACT, atol=EXACT)
    assert reading.kept is None and (not seen or found[0].isfinite().all())


def test_experts_of_one_scope_are_not_used_in_another() -> None:
    reading, x = reader("ties-ca"), tokens(2, 6)
    with torch.no_grad():
        reading(x[:, :2]), reading(x[:, 2:3])
        for p in reading.layer.parameters():
            p.data.mul_(0.8)
        state, reading.cache = reading.state.layers["layer"], ParameterCache()
        found = reading(x[:, 3:4])
        reading.state.layers["layer"], reading.cached = state, 3
        reading.state.counts, reading.cache = (3, 3), None
        torch.testing.assert_close(found, reading(x[:, 3:4]), rtol=EXACT, atol=EXACT)
    assert pickle.loads(pickle.dumps(state)).merged is None


def test_many_different_rows_are_not_kept() -> None:
    """Memory: twice that of the experts and the base at most."""
    for batch, there in ((2 * (EXPERTS + 1), True), (2 * (EXPERTS + 1) + 1, False)):
        reading = reader()
        with torch.no_grad():
            reading(tokens(batch, 6))
            reading(tokens(batch, 1))
        assert reading.kept is not None and bool(reading.kept.maps) == there


def test_autocast_keeps_experts_in_its_own_format() -> None:
    reading, x = Reader(reader().layer.float()), tokens(1, 9).float()
    with torch.no_grad():
        expected = reader().layer.float()
        whole = Reader(expected)(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = torch.cat([reading(x[:, :3]), *(reading(x[:, t : t + 1]) for t in range(3, 9))], dim=1)
        assert reading.kept is not None and reading.kept.dtype == torch.bfloat16
    # products of two roundings of 2^-9 each, of values of about 1 in sums of 8
    torch.testing.assert_close(found.float(), whole, rtol=0.05, atol=0.05)
