"""Key-value caches of transformers with router state beside the keys and values.

A cache of transformers is a list of layers, and whatever selects rows or positions of it asks each of its layers to
follow. The router state is one more layer at the end of that list: a cache that `generate` returns can be continued, a
copied one continues separately, and a cache that is dropped takes its state with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from camex_ft.moe.routing.cache import RoutingState


class RoutingLayer:
    """Layer of a key-value cache without keys and values: it holds the router state and follows the other layers.

    Attributes:
        state: the router state.
        is_sliding: as the first layer's, so that no mask is made for this layer's sake. The other attributes are those
            of transformers' layers that hold nothing (`DummyLayer`, which older releases do not have).
    """

    is_compileable = is_croppable = is_initialized = True
    supports_early_init = False
    keys = values = None

    def __init__(self, state: RoutingState, *, is_sliding: bool) -> None:
        self.state = state
        self.is_sliding = is_sliding

    def lazy_initialization(self, *_: Any) -> None:
        """Do nothing, as there is nothing to allocate; neither do `prefetch` and `offload`."""

    prefetch = offload = lazy_initialization

    def get_max_length(self) -> int:
        """Return -1: no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in the first releases

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows by their beams, [B] indices."""
        self.state.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows, by indices or a mask [B]."""
        self.state.select(torch.arange(len(self.state.counts), device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.state.select(torch.arange(len(self.state.counts)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last positions; as in transformers, their number is negative or 0."""
        self.state.crop(abs(tokens_to_remove))

    def reset(self) -> None:
        """Forget the state."""
        self.state.reset()


def _routing_layer(cache: Cache) -> RoutingLayer | None:
    layers: list[Any] = _self_attention(cache).layers
    return next((layer for layer in layers if isinstance(layer, RoutingLayer)), None)


def _self_attention(cache: Cache) -> Cache:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def length(cache: Any) -> int:
    """Return the number of positions that a cache holds; 0 for None."""
    return int(cache.get_seq_length()) if isinstance(cache, Cache) else 0


def state_of(cache: Cache, owner: object) -> RoutingState | None:
    """Return the router state beside a cache, or None if there is none of this model."""
    layer = _routing_layer(cache)
    if layer is None or layer.state.owner is not owner or not layer.state.layers:
        return None
    return layer.state


def attach(cache: Cache, state: RoutingState) -> None:
    """Put the router state beside the keys and values."""
    layer = _routing_layer(cache)
    if layer is None:
        layers: list[Any] = _self_attention(cache).layers
        layers.append(RoutingLayer(state, is_sliding=bool(getattr(layers[0], "is_sliding", False))))
    else:
        layer.state = state


def find(output: Any) -> Cache | None:
    """Return the cache in a model's output, or None."""
    found = getattr(output, "past_key_values", None)
    if found is None and isinstance(output, tuple):
        found = next((part for part in output if isinstance(part, Cache)), None)
    return found if isinstance(found, Cache) else None
