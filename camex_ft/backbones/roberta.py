"""RoBERTa, XLM-RoBERTa, CamemBERT: BERT's layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from camex_ft.backbones.base import DenseFFN, register
from camex_ft.backbones.layouts import bert_ffns, encoder_stack, one_stack

if TYPE_CHECKING:
    from torch import nn


@register("roberta", model_types=("roberta", "xlm-roberta", "camembert"), masks=one_stack(encoder_stack))
def ffns(model: nn.Module) -> list[DenseFFN]:
    """RoBERTa, XLM-RoBERTa, CamemBERT: encoder."""
    return bert_ffns(model)
