"""BERT and ELECTRA: one bidirectional stack, FFN `intermediate` + `output.dense`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from camex_ft.backbones.base import DenseFFN, register
from camex_ft.backbones.layouts import bert_ffns, encoder_stack, one_stack

if TYPE_CHECKING:
    from torch import nn


@register(
    "bert",
    model_types=("bert", "electra"),
    masks=one_stack(encoder_stack),
    attention=("query", "value"),
)
def ffns(model: nn.Module) -> list[DenseFFN]:
    """BERT, ELECTRA: encoder."""
    return bert_ffns(model)
