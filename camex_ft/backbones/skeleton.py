"""A backbone without its weights: its configuration, and the model that `load` would return, on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from camex_ft import synthetic
from camex_ft.backbones import source
from camex_ft.backbones.loading import label_fields, read_config
from camex_ft.config.backbones import EMBEDDED
from camex_ft.synthetic import HEADS
from camex_ft.synthetic.tokenizer import TRAINED_SIZE
from camex_ft.utils.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def configuration(
    spec: str,
    *,
    head: str = "sequence-classification",
    label_names: Sequence[str] | None = None,
    num_labels: int | None = None,
    regression: bool = False,
    path: Path | None = None,
) -> PreTrainedConfig:
    """Return the configuration of the backbone `spec` under `head`; nothing is made of it.

    Args:
        spec, head, label_names, num_labels, regression, path: as of `load.load`.

    Raises:
        UserError: `spec` or its configuration is at fault, or out of reach.
    """
    if head not in HEADS:
        raise UserError(f"unknown head '{head}'.{nearest(head, HEADS)} Known heads: {', '.join(HEADS)}")
    labels = label_fields(head, label_names, num_labels, regression)
    if source.kind(spec) == "embedded":
        source.check(spec)
        return synthetic.configuration(spec.removeprefix(EMBEDDED), head=head, **labels)[0]
    path = path or source.locate(spec, weights=False)
    source.check_files(path, spec, weights=False)
    return read_config(path, spec, head, labels)


def skeleton(
    spec: str,
    *,
    head: str = "sequence-classification",
    label_names: Sequence[str] | None = None,
    num_labels: int | None = None,
    regression: bool = False,
    path: Path | None = None,
    trained_tokenizer: bool = False,
) -> PreTrainedModel:
    """Return the backbone `spec` under `head`, in float32 on the meta device, in training mode.

    No weights are read or made. Of a hub id the small files alone are fetched, of a GGUF file the header is read.

    Args:
        spec, head, label_names, num_labels, regression, path: as of `load.load`.
        trained_tokenizer: an embedded backbone's tokenizer would be trained on the data: its vocabulary then counts as
            full (`TRAINED_SIZE` tokens), which only a very small text leaves it short of.

    Raises:
        UserError: `spec` or its configuration is at fault, or out of reach.
    """
    config = configuration(
        spec, head=head, label_names=label_names, num_labels=num_labels, regression=regression, path=path
    )
    if trained_tokenizer:
        config.vocab_size = TRAINED_SIZE
    config.__dict__.pop("quantization_config", None)  # of the weights that are not read
    with torch.device("meta"):
        made: PreTrainedModel = HEADS[head].from_config(config, dtype=torch.float32, trust_remote_code=False)
    return made.train()
