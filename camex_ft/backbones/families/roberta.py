"""RoBERTa, XLM-RoBERTa, CamemBERT: BERT's layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from camex_ft.backbones.base import DenseFFN, register
from camex_ft.backbones.layouts import bert_ffns, encoder_stack, one_stack

if TYPE_CHECKING:
    from torch import nn


def positions(config: Any) -> int:
    """Return the size of the table of positions without those up to the padding id's, from which they are counted."""
    return int(config.max_position_embeddings) - (config.pad_token_id or 0) - 1


@register(
    "roberta",
    model_types=("roberta", "xlm-roberta", "camembert"),
    masks=one_stack(encoder_stack),
    positions=positions,
    attention=("query", "value"),
)
def ffns(model: nn.Module) -> list[DenseFFN]:
    """RoBERTa, XLM-RoBERTa, CamemBERT: encoder."""
    return bert_ffns(model)
