"""Backbones at their published sizes, from their configuration and with random weights: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from camex_ft import synthetic
from camex_ft.backbones.base import plain_type
from camex_ft.config.backbones import EMBEDDED
from camex_ft.synthetic import HEADS, has_head
from camex_ft.utils.architectures import positions
from camex_ft.utils.errors import UserError, nearest
from camex_ft.utils.registry import EMBEDDED as FAMILIES

LABELS = 2
# Model type of transformers, and what its configuration class is called with: the config.json of the hub.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "t5-base": (
        "t5",
        {
            "vocab_size": 32128,
            "d_model": 768,
            "d_kv": 64,
            "d_ff": 3072,
            "num_layers": 12,
            "num_decoder_layers": 12,
            "num_heads": 12,
            "relative_attention_num_buckets": 32,
            "dropout_rate": 0.1,
            "feed_forward_proj": "relu",
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        },
    ),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
            "pad_token_id": 50256,  # it has none of its own; the package takes the end token
        },
    ),
    "bert-base-uncased": (
        "bert",
        {
            "vocab_size": 30522,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "pad_token_id": 0,
        },
    ),
}


def names() -> tuple[str, ...]:
    """Return every backbone that `build` knows."""
    return (*PUBLISHED, *(EMBEDDED + family for family in FAMILIES.names()))


def check(name: str) -> None:
    """Raise `UserError` for a name that `build` does not know."""
    if name not in names():
        raise UserError(f"unknown backbone '{name}'.{nearest(name, names())} Known: {', '.join(names())}.")


def build(name: str, *, head: str = "sequence-classification", seed: int = 0) -> PreTrainedModel:
    """Return a dense model with random weights under a head, in training mode.

    Args:
        name: of the backbone.
        head: a key of `camex_ft.synthetic.HEADS`.
        seed: of the weights.

    Raises:
        UserError: no backbone of that name, or one that has no such head.
    """
    check(name)
    if name.startswith(EMBEDDED):
        tiny, _ = synthetic.backbone(name.removeprefix(EMBEDDED), head=head, num_labels=LABELS, seed=seed)
        return tiny.train()
    model_type, sizes = PUBLISHED[name]
    config = AutoConfig.for_model(model_type, num_labels=LABELS, **sizes)
    # transformers gives BERT a causal head too, which is causal only as half of an encoder-decoder
    if not has_head(type(config), head) or (head == "causal-lm" and model_type == "bert"):
        raise UserError(f"backbone '{name}' has no head '{head}'")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = HEADS[head].from_config(config)
    return model.train()


def inputs(model: PreTrainedModel, *, batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a batch of random tokens without padding, and labels, on the model's device.

    Raises:
        UserError: the model has no positions for sequences of this length.
    """
    config: Any = model.config
    limit = positions(config)
    if limit is not None and length > limit:
        raise UserError(f"--length is {length}: {plain_type(config.model_type)} has {limit} positions here")
    special = {
        getattr(config, f"{role}_token_id", None) for role in ("pad", "bos", "eos", "decoder_start")
    } - {None}
    words = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    ids = words[torch.randint(len(words), (batch, length), generator=generator)]
    if plain_type(config.model_type) == "t5":
        ids[:, -1] = config.eos_token_id  # its classifier reads the end token
    labels = torch.randint(LABELS, (batch,), generator=generator)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(model.device) for name, tensor in made.items()}
