"""From the arguments of a model's call to a `Pass` for its expert layers, and back to its key-value cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import find_packed_sequence_indices

from camex_ft.backbones import kv_cache
from camex_ft.backbones.base import Family
from camex_ft.moe.context import Pass, RoutingContext
from camex_ft.moe.merging.reference import traced
from camex_ft.moe.routing.cache import RoutingState
from camex_ft.moe.routing.router import masked_mean


def read_pass(
    family: Family, context: RoutingContext, module: nn.Module, arguments: Mapping[str, Any]
) -> Pass:
    """Return the pass of one call.

    Args:
        family: of the model.
        context: of the model; a cache of another one's has no state for it.
        module: that is called.
        arguments: of the call, by name.

    Raises:
        RuntimeError: `generate_batch`, whose rows hold several prompts.
        ValueError: a mask of a shape that routing cannot use.
    """
    if "read_index" in arguments:
        raise RuntimeError(
            "generate_batch packs tokens of many prompts in one row and keeps them in pages, of which routing knows "
            "nothing: use generate, with padding on the left"
        )
    past: Any = arguments.get("past_key_values")
    cached = kv_cache.length(past)
    if not isinstance(past, Cache) or not past.is_compileable:
        masks = family.masks(module, arguments)
    else:
        masks = family.masks(module, _with_flat_masks(arguments))
    state = kv_cache.state_of(past, context) if cached else None
    wanted = arguments.get("use_cache")
    caching = past is not None or bool(
        getattr(module.config, "use_cache", False) if wanted is None else wanted
    )
    caching = caching and not traced()  # an exported program has no place for what routing remembers
    outputs, encoded = arguments.get("encoder_outputs"), None
    if outputs is not None and state is None:
        encoded = masked_mean(outputs[0], masks.get("encoder"))
    return Pass(
        masks=masks,
        documents=None if caching else _documents(arguments),
        cached=cached,
        cache=past,
        caching=caching,
        state=state,
        encoded=encoded,
    )


def write_state(ended: Pass, output: Any, state: RoutingState) -> None:
    """Put what routing remembers beside the key-value cache that the call was given, or returned."""
    found = ended.cache if ended.cache is not None else kv_cache.find(output)
    if found is not None:
        kv_cache.attach(found, state)


def _documents(arguments: Mapping[str, Any]) -> Tensor | None:
    """Number packed documents where position ids begin anew, as transformers' own masks do; [B, L] or [1, L]."""
    positions: Any = arguments.get("position_ids")
    if positions is None or arguments.get("attention_mask") is not None:
        return None
    return find_packed_sequence_indices(positions)


def _with_flat_masks(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments with the padding masks [B, P] of the attention masks that `generate` makes beforehand.

    For a cache of fixed length it passes [B, 1, L, P] masks, whose last row shows all real tokens.

    Raises:
        ValueError: attention is to a sliding window only, which does not show them all.
    """
    made = dict(arguments)
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = made.get(name)
        if isinstance(mask, dict):
            mask = made[name] = mask.get("full_attention")
            if mask is None:
                raise ValueError(
                    "routing cannot read padding from the masks of a sliding window's fixed cache"
                )
        if isinstance(mask, Tensor) and mask.dim() == 4:
            last = mask[:, 0, -1]  # [B, P]
            made[name] = last if last.dtype == torch.bool else last == 0
    return made
