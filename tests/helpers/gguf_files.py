"""Tiny models of the Llama family in GGUF files, written with the package `gguf`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from camex_ft import synthetic

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{f"self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}
HEAD = (
    8  # size of one attention head; qwen3 has its default, the only one that transformers takes from a file
)
Tensors = dict[str, np.ndarray]


def tiny_model(model_type: str = "llama", *, tied: bool = True, seed: int = 0) -> tuple[Any, Any]:
    """Return a model of two layers with random weights, norms and biases too, and a byte-level tokenizer."""
    _, tokenizer = synthetic.backbone("qwen2", head="base")
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128 if model_type == "qwen3" else HEAD,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        **{f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")},
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model, tokenizer


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", HEAD))


def tensors_of(model: Any) -> Tensors:
    """Return the model's weights under the names, and in the layout, of a GGUF file."""
    tensors: Tensors = {}
    tied = model.config.tie_word_embeddings
    for name, parameter in model.state_dict().items():
        if tied and name.startswith("lm_head"):
            continue
        stem, _, end = name.rpartition(".")
        layer, block = stem.removeprefix("model.layers.").partition(".")[::2]
        value = parameter.numpy()
        if stem.endswith(("q_proj", "k_proj")) and model.config.model_type == "llama":
            value = _interleaved(value)
        tensors[f"blk.{layer}.{NAMES[block]}.{end}" if layer.isdigit() else f"{NAMES[stem]}.{end}"] = value
    return tensors


def _interleaved(weight: np.ndarray) -> np.ndarray:
    """Rotary pairs side by side, as the format has them for `llama`; transformers has them half a head apart."""
    return weight.reshape(-1, 2, HEAD // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: Any,
    tokenizer: Any,
    *,
    architecture: str | None = None,
    vocabulary: bool = True,
    kind: str = "gpt2",
    quantise: gguf.GGMLQuantizationType | None = None,
    edit: Callable[[Tensors], Any] = lambda tensors: None,
    more: Callable[[gguf.GGUFWriter], Any] = lambda writer: None,
) -> Path:
    """Write `model` to `path` and return it.

    Args:
        vocabulary: whether the tokenizer goes into the file.
        kind: what the file calls its kind of tokenizer.
        quantise: type of the matrices; float32 if None.
        edit: changes the tensors in place before they are written.
        more: adds keys and values.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture or config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_size(config))
    writer.add_vocab_size(config.vocab_size)
    if vocabulary:
        _add_vocabulary(writer, tokenizer, kind)
    more(writer)
    tensors = tensors_of(model)
    edit(tensors)
    for name, value in tensors.items():
        if quantise is not None and value.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(value, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, kind: str) -> None:
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = set(tokenizer.all_special_tokens)
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 0)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
