"""Key-value caches of transformers with the state of routing beside the keys and values.

The state lies on the cache object itself and follows what is done to it: a cache that `generate` returns can be gone on
from, a copied one goes on by itself, and one that is dropped takes its state with it. No model and no thread keeps any.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from camex_ft.moe.routing.cache import RoutingState


class Routed:
    """Mixed into the class of a cache that carries a state: whatever selects rows or positions does so for both."""

    routing: RoutingState

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the cache's own class, from which this one is made again."""
        reduced: Any = super().__reduce_ex__(protocol)
        return _blank, (type(self).__mro__[2],), *reduced[2:]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let rows follow their beams."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.routing.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.routing.select(torch.arange(len(self.routing.counts), device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.routing.select(torch.arange(len(self.routing.counts)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last positions; as in transformers, the number is negative."""
        super().crop(tokens_to_remove)  # type: ignore[misc]
        self.routing.crop(abs(tokens_to_remove))

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()  # type: ignore[misc]
        self.routing.reset()


_classes: dict[type[Cache], type[Cache]] = {}


def _routed(kind: type[Cache]) -> type[Cache]:
    """Return the class with `Routed` mixed in; `isinstance` of the cache's own class stays true."""
    if kind not in _classes:
        _classes[kind] = type(kind.__name__, (Routed, kind), {"__module__": kind.__module__})
    return _classes[kind]


def _blank(kind: type[Cache]) -> Cache:
    """Return an empty cache of the class with `Routed` mixed in."""
    return object.__new__(_routed(kind))


def _own(cache: Cache) -> Cache:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def length(cache: Any) -> int:
    """Return how many positions a cache holds; 0 for none."""
    return int(cache.get_seq_length()) if isinstance(cache, Cache) else 0


def state_of(cache: Cache, owner: object) -> RoutingState | None:
    """Return the state that lies beside a cache, or None where there is none of this model's."""
    state = getattr(_own(cache), "routing", None)
    if not isinstance(state, RoutingState) or state.owner is not owner or not state.layers:
        return None
    return state


def attach(cache: Cache, state: RoutingState) -> None:
    """Put the state of routing beside the keys and values."""
    own = _own(cache)
    if not isinstance(own, Routed):
        own.__class__ = _routed(type(own))
    cast(Routed, own).routing = state


def find(output: Any) -> Cache | None:
    """Return the cache in a model's output, or None."""
    found = getattr(output, "past_key_values", None)
    if found is None and isinstance(output, tuple):
        found = next((part for part in output if isinstance(part, Cache)), None)
    return found if isinstance(found, Cache) else None
