"""Forward state of a model's call, and router state beside its key-value cache.

`read_call` turns the arguments of a call into a `ForwardState` for the expert layers. A cache of transformers is a list
of layers, and whatever selects rows or positions of it asks each of its layers to follow. The router state is one more
layer at the end of that list: a cache that `generate` returns can be continued, a copied one continues separately, and
a cache that is dropped takes its state with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache
from transformers.masking_utils import find_packed_sequence_indices

from camex_ft.backbones.base import Family
from camex_ft.moe.context import ForwardState, RoutingContext
from camex_ft.moe.merging.functional import traced
from camex_ft.moe.routing.router import masked_mean
from camex_ft.moe.routing.router_state import RouterState


def read_call(
    family: Family, context: RoutingContext, module: nn.Module, arguments: Mapping[str, Any]
) -> ForwardState:
    """Return the forward state of one call.

    Args:
        family: of the model.
        context: of the model; a cache of another model has no router state for it.
        module: the called module.
        arguments: of the call, by name.

    Raises:
        RuntimeError: `generate_batch`, whose rows hold several prompts.
        ValueError: a mask of a shape that routing cannot use.
    """
    if "read_index" in arguments:
        raise RuntimeError(
            "generate_batch packs tokens of many prompts in one row of a paged cache, which routing cannot read: "
            "use generate, with padding on the left"
        )
    past: Any = arguments.get("past_key_values")
    cached = int(past.get_seq_length()) if isinstance(past, Cache) else 0
    if not isinstance(past, Cache) or not past.is_compileable:
        masks = family.masks(module, arguments)
    else:
        masks = family.masks(module, _with_flat_masks(arguments))
    router_state = _router_state(past, context) if cached else None
    use_cache = arguments.get("use_cache")
    use_cache = getattr(module.config, "use_cache", False) if use_cache is None else use_cache
    resumable = (
        past is not None or bool(use_cache)
    ) and not traced()  # an exported program has no router state
    outputs, encoded = arguments.get("encoder_outputs"), None
    if outputs is not None and router_state is None:
        encoded = masked_mean(outputs[0], masks.get("encoder"))
    # packed documents begin where position ids begin anew, as in transformers' own masks
    positions: Any = None if resumable else arguments.get("position_ids")
    packed = positions is not None and arguments.get("attention_mask") is None
    return ForwardState(
        masks=masks,
        documents=find_packed_sequence_indices(positions) if packed else None,
        cached=cached,
        kv_cache=past,
        resumable=resumable,
        router_state=router_state,
        encoded=encoded,
    )


def write_router_state(state: ForwardState, output: Any, router_state: RouterState) -> None:
    """Put router state beside the key-value cache among the call's arguments, or in its output."""
    cache = state.kv_cache if state.kv_cache is not None else getattr(output, "past_key_values", None)
    if cache is None and isinstance(output, tuple):
        cache = next((part for part in output if isinstance(part, Cache)), None)
    if not isinstance(cache, Cache):
        return
    layer = _router_state_layer(cache)
    if layer is None:
        layers: list[Any] = _self_attention(cache).layers
        layers.append(
            RouterStateLayer(router_state, is_sliding=bool(getattr(layers[0], "is_sliding", False)))
        )
    else:
        layer.state = router_state


def _with_flat_masks(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments with padding masks [B, P] in place of attention masks that `generate` prepared.

    For a cache of fixed length `generate` passes [B, 1, L, P] masks, whose last row shows all real tokens.

    Raises:
        ValueError: attention is to a sliding window only, which does not show them all.
    """
    flat = dict(arguments)
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = flat.get(name)
        if isinstance(mask, dict):
            mask = flat[name] = mask.get("full_attention")
            if mask is None:
                raise ValueError(
                    "routing cannot read padding from the masks of a sliding window's fixed cache"
                )
        if isinstance(mask, Tensor) and mask.dim() == 4:
            last = mask[:, 0, -1]  # [B, P]
            flat[name] = last if last.dtype == torch.bool else last == 0
    return flat


class RouterStateLayer:
    """Layer of a key-value cache without keys and values: it holds the router state and follows the other layers.

    Attributes:
        state: the router state.
        is_sliding: as the first layer's, so that no mask is made for this layer's sake. The other attributes are those
            of transformers' layers that hold nothing (`DummyLayer`, which older releases do not have).
    """

    is_compileable = is_croppable = is_initialized = True
    supports_early_init = False
    keys = values = None

    def __init__(self, state: RouterState, *, is_sliding: bool) -> None:
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


def _router_state_layer(cache: Cache) -> RouterStateLayer | None:
    layers: list[Any] = _self_attention(cache).layers
    return next((layer for layer in layers if isinstance(layer, RouterStateLayer)), None)


def _self_attention(cache: Cache) -> Cache:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _router_state(cache: Cache, owner: object) -> RouterState | None:
    """Return the router state beside a cache, or None where there is none of this model's."""
    layer = _router_state_layer(cache)
    if layer is None or layer.state.owner is not owner or not layer.state.layers:
        return None
    return layer.state
