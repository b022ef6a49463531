"""Small models of several families for the tests of `camex-ft plan`, and one training step's inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from camex_ft.backbones.heads import HEADS
from camex_ft.config import Config, load_config
from camex_ft.estimate.survey import Batch

WIDTH, INNER, HEADS_OF_ATTENTION, LAYERS, VOCABULARY = 64, 128, 4, 2, 100
ROWS, LENGTH = 4, 64
CLASSIFIER = "sequence-classification"
SEGMENT = 16
CASES = [
    ("t5", CLASSIFIER),
    ("t5", "seq2seq-lm"),
    ("bert", CLASSIFIER),
    ("roberta", CLASSIFIER),
    ("distilbert", CLASSIFIER),
    ("gpt2", "causal-lm"),
    ("llama", "causal-lm"),
    ("qwen3", "causal-lm"),
]


def sizes(
    model_type: str, *, dropout: float = 0.0, layers: int = LAYERS, wide: bool = False
) -> dict[str, Any]:
    width, inner = (4 * WIDTH, 8 * INNER) if wide else (WIDTH, INNER)
    if model_type == "t5":
        return {
            "d_model": width,
            "d_ff": inner,
            "d_kv": width // HEADS_OF_ATTENTION,
            "num_heads": HEADS_OF_ATTENTION,
            "num_layers": layers,
            "num_decoder_layers": layers,
            "dropout_rate": dropout,
            "decoder_start_token_id": 0,
        }
    named = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    if model_type == "distilbert":
        named = {"dim": width, "hidden_dim": inner, "n_layers": layers, "dropout": dropout}
    if model_type == "gpt2":
        named = {"n_embd": width, "n_inner": inner, "n_layer": layers}
        named |= dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], dropout)
    heads = {"distilbert": "n_heads", "gpt2": "n_head"}.get(model_type, "num_attention_heads")
    named |= {heads: HEADS_OF_ATTENTION, "max_position_embeddings": 2 * LENGTH}
    dropouts = dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob"], dropout)
    return named | dropouts | {"attention_dropout": dropout, "num_key_value_heads": 2}


def small(
    model_type: str,
    head: str,
    *,
    attention: str = "sdpa",
    dropout: float = 0.0,
    layers: int = LAYERS,
    wide: bool = False,
) -> Any:
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "use_cache": False}
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY,
        **special,
        **sizes(model_type, dropout=dropout, layers=layers, wide=wide),
    )
    torch.manual_seed(0)
    return HEADS[head].from_config(config, attn_implementation=attention).train()


def batch(model: Any, *, steps: int = 1) -> Batch:
    target = LENGTH if model.config.is_encoder_decoder else 0
    return Batch(rows=ROWS, length=LENGTH, target=target, steps=steps)


def inputs(head: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 1
    labels = ids if "lm" in head else torch.zeros(ROWS, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


MEASURED = {
    "t5": {
        "vocab_size": 16000,
        "d_model": 512,
        "d_ff": 2048,
        "d_kv": 64,
        "num_heads": 8,
        "num_layers": 6,
        "num_decoder_layers": 6,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    },
    "llama": {
        "vocab_size": 16000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
WAYS = {
    "dense": ("merging.protocol=dense",),
    "merged": ("merging.protocol=domain-ca",),
    "ep-camex": ("merging.protocol=ep-camex",),
    "lora": ("merging.protocol=domain-ca", "tuning.mode=lora"),
}


def measured_configuration(family: str, way: str, folder: Path) -> Config:
    """One of the eight configurations of docs/plan.md, whose backbone is written to `folder`."""
    config = transformers.AutoConfig.for_model(family, pad_token_id=0, **MEASURED[family])
    config.save_pretrained(folder)
    overrides = ["profile=embedded", f"backbone=new:{folder}", "merging.experts=4", "merging.top_k=2"]
    overrides += ["task.max_length=128", "training.per_device_train_batch_size=8", *WAYS[way]]
    if family == "t5":
        return load_config("glue", overrides)
    return load_config("lm", [*overrides, "task.block_size=256", "routing.segment=64"])
