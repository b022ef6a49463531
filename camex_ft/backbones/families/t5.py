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

    The first of these says which of the decoder's positions are real: `decoder_attention_mask`; under a
    language-modelling head the `labels` that they predict, or else all, as its attention takes them; without that head
    `decoder_input_ids`, less padding tokens after the first (with a cache: all). A head that is given none of them
    feeds `input_ids` shifted to the right and passes no mask: then it is the encoder's, so that start token + real
    tokens without the last are pooled, whatever the padding.
    """
    encoder = two_dimensional(inputs, "attention_mask")
    return {"encoder": encoder, "decoder": _decoder_mask(model, inputs, encoder)}


def _decoder_mask(model: nn.Module, inputs: Mapping[str, Any], encoder: Tensor | None) -> Tensor | None:
    mask = two_dimensional(inputs, "decoder_attention_mask")
    if mask is not None:
        return mask
    pad = getattr(model.config, "pad_token_id", None)
    ids, embeds = inputs.get("decoder_input_ids"), inputs.get("decoder_inputs_embeds")
    if generates(model):
        labels = inputs.get("labels")
        return None if labels is None else (labels != -100) & (labels != pad)
    if ids is not None and inputs.get("past_key_values") is None:
        real = ids != pad
        real[:, 0] = True  # the start token is the padding token
        return real
    return None if ids is not None or embeds is not None else encoder


def _stack(model: nn.Module, path: str) -> Stack:
    """The nearest enclosing module that knows whether it is a decoder says so."""
    while path:
        path = path.rpartition(".")[0]
        is_decoder = getattr(model.get_submodule(path), "is_decoder", None)
        if is_decoder is not None:
            return "decoder" if is_decoder else "encoder"
    raise ValueError(f"{type(model).__name__}: no T5 stack around its feed-forward layers")


def positions(config: Any) -> None:
    """Return None, no limit: positions are relative."""
    return


@register("t5", model_types=("t5", "mt5", "umt5"), masks=masks, positions=positions, attention=("q", "v"))
def ffns(model: nn.Module) -> list[DenseFFN]:
    """T5 (relu, gated), mT5, UMT5: encoder and decoder."""
    layers: list[DenseFFN] = []
    count: Counter[str] = Counter()
    for path, block in [*find(model, "wi", "wo", "act"), *find(model, "wi_0", "wi_1", "wo", "act")]:
        stack = _stack(model, path)
        up = (
            {"gate": linear(block.wi_0), "up": linear(block.wi_1)}
            if hasattr(block, "wi_0")
            else {"up": linear(block.wi)}
        )
        layers.append(
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
    return layers
