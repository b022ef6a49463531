"""Tiny models of every registered family, variant and head, made from configurations, and inputs for them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers

from camex_ft.backbones.heads import HEADS, has_head
from camex_ft.upcycling import routing_context
from camex_ft.utils import registry

PAD, EOS, BOS = 0, 1, 2
VOCABULARY, LENGTH, LAYERS, HIDDEN, INNER = 40, 7, 3, 8, 12
# One dictionary for all families: each configuration class takes the names that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "d_kv": 4,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
    "decoder_start_token_id": PAD,
    "use_cache": False,
} | dict.fromkeys(["intermediate_size", "d_ff", "n_inner", "hidden_dim"], INNER)
OWN, CHOSEN = 4, 2  # experts of mixtures, and how many serve a token
MIXTURE_SIZES: dict[str, Any] = {
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], OWN),
    "num_experts_per_tok": CHOSEN,
    "moe_intermediate_size": INNER,
    "shared_expert_intermediate_size": 10,
    "q_lora_rank": None,
    "kv_lora_rank": 6,
    **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"], 4),
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "t5": [{}, {"feed_forward_proj": "gated-gelu"}, {"num_decoder_layers": 2}],
    "bert": [{}, {"is_decoder": True}],
    "llama": [{}, {"mlp_bias": True}, {"is_causal": False}],
    # weights normalised before and after the choice of experts, and dense blocks between or before the mixtures
    "mixtral": [{}],
    "qwen2_moe": [{"norm_topk_prob": True}, {"mlp_only_layers": [1]}],
    "qwen3_moe": [{"norm_topk_prob": True}, {"decoder_sparse_step": 2}],
    "olmoe": [{}, {"norm_topk_prob": True}],
    "deepseek_v2": [{"first_k_dense_replace": 1}, {"routed_scaling_factor": 2.5}],
}


def config_of(model_type: str, variant: dict[str, Any]) -> Any:
    mixture = {} if model_type in model_types() else MIXTURE_SIZES
    heads = {"num_key_value_heads": 2} if model_type.startswith("deepseek") else {}  # its attention is latent
    return transformers.AutoConfig.for_model(model_type, **{**SIZES, **mixture, **heads, **variant})


@cache
def heads_of(model_type: str) -> tuple[str, ...]:
    """Return the heads of a type; cached, since collection asks hundreds of times."""
    kind = type(config_of(model_type, {}))
    return tuple(head for head in HEADS if has_head(kind, head))


def family_names(*, mixtures: bool = False) -> list[str]:
    """Return the names of the families of dense backbones, or of those of sparse mixtures."""
    names = registry.BACKBONES.names()
    return [name for name in names if (registry.BACKBONES.get(name).routing is not None) == mixtures]


def model_types(*, mixtures: bool = False) -> list[str]:
    """Return the types of the dense backbones, or of the sparse mixtures."""
    names = family_names(mixtures=mixtures)
    return [t for name in names for t in registry.BACKBONES.get(name).model_types]


def make(model_type: str, head: str, variant: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = HEADS[head].from_config(config_of(model_type, variant)).eval()
    for (
        parameter
    ) in model.parameters():  # biases are zero and norms one at initialisation, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs_of(model: Any, head: str) -> dict[str, torch.Tensor]:
    """Two rows, the second padded on the right, each with one end token as T5's classifier asks."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    ids[0, 6] = ids[1, 4] = EOS
    ids[1, 5:] = PAD
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder and head in ("base", "seq2seq-lm"):
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 5), generator=generator)
    if head == "multiple-choice":
        inputs = {name: value.unsqueeze(1).repeat(1, 2, 1) for name, value in inputs.items()}
    return inputs


def gradients_twice(
    made: transformers.PreTrainedModel, inputs: dict[str, Any]
) -> list[dict[str, torch.Tensor]]:
    """Gradients of the logits' squares and the balance loss, without gradient checkpointing and with it."""
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            made.activation_checkpointing_enable({"use_reentrant": False})
        made.zero_grad()
        torch.manual_seed(0)
        context = routing_context(made)
        assert context is not None
        logits = made(**inputs).logits
        (logits.square().sum() + context.last.balance_loss()).backward()
        found.append({n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None})
    return found
