"""T5, mT5, UMT5: encoder and decoder, FFN `DenseReluDense`, plain (v1.0) or gated (v1.1, Flan, mT5, UMT5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from camex_ft.backbones.base import DenseFFN, Stack, generates, register
from camex_ft.backbones.layouts import find, linear, two_dimensional

if TYPE_CHECKING:
    from torch import Tensor, nn

    from camex_ft.backbones.base import Masks


def masks(model: nn.Module, inputs: Mapping[str, Any]) -> Masks:
    """Return the masks of both stacks.

    The decoder's positions are, in this order: masked as the caller says (`decoder_attention_mask`); real where
    the label that they predict is real (language modelling with `labels`); all real (the caller gives
    `decoder_input_ids`); or, under the heads that shift `input_ids` to the right themselves and pass no mask,
    the encoder's: its positions then hold the start token and the real tokens without the last, whatever the
    padding.
    """
    encoder = two_dimensional(inputs, "attention_mask")
    return {"encoder": encoder, "decoder": _decoder_mask(model, inputs, encoder)}


def _decoder_mask(model: nn.Module, inputs: Mapping[str, Any], encoder: Tensor | None) -> Tensor | None:
    given = two_dimensional(inputs, "decoder_attention_mask")
    if given is not None:
        return given
    decoder_inputs = [inputs.get(k) for k in ("decoder_input_ids", "decoder_inputs_embeds")]
    decoder_input = next((x for x in decoder_inputs if x is not None), None)
    labels = inputs.get("labels") if generates(model) else None
    if labels is not None and (decoder_input is None or decoder_input.shape[:2] == labels.shape):
        return (labels != -100) & (labels != getattr(model.config, "pad_token_id", None))
    if decoder_input is not None or generates(model):
        return None
    return encoder


def _stack(model: nn.Module, path: str) -> Stack:
    """The nearest enclosing module that knows whether it is a decoder says so."""
    while path:
        path = path.rpartition(".")[0]
        is_decoder = getattr(model.get_submodule(path), "is_decoder", None)
        if is_decoder is not None:
            return "decoder" if is_decoder else "encoder"
    raise ValueError(f"{type(model).__name__}: no T5 stack around its feed-forward layers")


@register("t5", model_types=("t5", "mt5", "umt5"), masks=masks)
def ffns(model: nn.Module) -> list[DenseFFN]:
    """T5 (relu, gated), mT5, UMT5: encoder and decoder."""
    found: list[DenseFFN] = []
    count: Counter[str] = Counter()
    for path, block in [*find(model, "wi", "wo", "act"), *find(model, "wi_0", "wi_1", "wo", "act")]:
        stack = _stack(model, path)
        up = (
            {"gate": linear(block.wi_0), "up": linear(block.wi_1)}
            if hasattr(block, "wi_0")
            else {"up": linear(block.wi)}
        )
        found.append(
            DenseFFN(
                path=path,
                stack=stack,
                layer=count[stack],
                weights={**up, "down": linear(block.wo)},
                activation=block.act,
                inner_dropout=block.dropout.p,
            )
        )
        count[stack] += 1
    return sorted(found, key=lambda ffn: ffn.stack == "decoder")
