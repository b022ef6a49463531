"""Write the small checkpoints that later versions of the package have to read: one of each family, and an adapter.

    python tests/stored/write.py            into tests/stored/<version of camex_ft>/, where a folder is not there yet

Folders of earlier versions stay as they are, and are never written again: that is what they are for.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

HERE = Path(__file__).parent
OUTPUTS = "outputs.safetensors"  # inputs under "in.", what the model makes of them under "out", in float64
SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim"], 8),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "num_heads", "n_head", "n_heads"], 2),
    **dict.fromkeys(["intermediate_size", "d_ff", "n_inner", "hidden_dim"], 12),
    **dict.fromkeys(["max_position_embeddings", "n_positions"], 16),
    "vocab_size": 24,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "d_kv": 4,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "decoder_start_token_id": 0,
}
MIXTURE_SIZES: dict[str, Any] = {
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 12),
    "num_experts_per_tok": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 6,
    **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"], 4),
    "first_k_dense_replace": 1,
}
OWN = {"upcycle": {"init": "own-experts"}}
# family: type, head, sections; every form of merging, kind of curvature and granularity is in one of them
CHECKPOINTS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "bert": ("bert", "sequence-classification", {"merging": {"protocol": "ties-ca", "top_k": 1}}),
    "distilbert": (
        "distilbert",
        "token-classification",
        {"merging": {"protocol": "smear"}, "routing": {"router": "cosine"}},
    ),
    "gpt2": (
        "gpt2",
        "causal-lm",
        {"merging": {"protocol": "ep-camex", "curvature": {"kind": "kronecker", "rank": 1}}},
    ),
    "llama": (
        "llama",
        "causal-lm",
        {"merging": {"protocol": "smoe", "top_k": 1}, "routing": {"granularity": "token"}},
    ),
    "mistral": ("mistral", "sequence-classification", {"merging": {"protocol": "namex-full"}}),
    "qwen": (
        "qwen2",
        "causal-lm",
        {
            "merging": {"protocol": "domain-ca", "alpha": 0.7, "curvature": {"kind": "diagonal"}},
            "routing": {"granularity": "segment", "segment": 3},
        },
    ),
    "roberta": (
        "xlm-roberta",
        "question-answering",
        {
            "merging": {"protocol": "dare-ca", "curvature": {"kind": "low-rank", "rank": 1}},
            "upcycle": {"layers": [1]},
        },
    ),
    "t5": ("t5", "seq2seq-lm", {"merging": {"protocol": "fisher"}, "upcycle": {"layers": "every_other"}}),
    "mixtral": ("mixtral", "causal-lm", {"merging": {"protocol": "smoe"}, **OWN}),
    "olmoe": (
        "olmoe",
        "causal-lm",
        {"merging": {"protocol": "ties-ca"}, "routing": {"segment": 3}, **OWN},
    ),
    "qwen_moe": ("qwen2_moe", "sequence-classification", {"merging": {"protocol": "domain"}, **OWN}),
    "deepseek": ("deepseek_v2", "causal-lm", {"merging": {"protocol": "smoe"}, **OWN}),
    "adapter": (
        "bert",
        "sequence-classification",
        {"merging": {"protocol": "domain-ca"}, "tuning": {"mode": "lora", "lora": {"rank": 1}}},
    ),
}
BACKBONE = "backbone"  # of the adapter: a folder in its own


def main() -> None:
    """Write what is not there yet."""
    from camex_ft import upcycling
    from camex_ft.upcycling import adapters, plan

    target = HERE / plan.versions()["camex_ft"]
    for name, (kind, head, sections) in CHECKPOINTS.items():
        folder = target / name
        if folder.exists():
            continue
        dense = dense_model(kind, head)
        if name == "adapter":
            dense.save_pretrained(folder / BACKBONE)
        merging = {"curvature": {"rank": 1}, **sections["merging"]}
        if "init" not in sections.get("upcycle", {}):
            merging = {"experts": 2, **merging}
        made = upcycling.upcycle(dense, **{**sections, "merging": merging}).eval()
        shake(made)
        adapters.save(made, folder)
        inputs = inputs_of(made)
        tensors = {**{f"in.{key}": value for key, value in inputs.items()}, "out": output(made, inputs)}
        save_file(tensors, folder / OUTPUTS)
        print(folder, sum(file.stat().st_size for file in folder.rglob("*")))


def dense_model(kind: str, head: str) -> PreTrainedModel:
    """Return a tiny model with random weights."""
    from camex_ft.backbones import family_for
    from camex_ft.backbones.heads import HEADS

    torch.manual_seed(0)
    sizes = SIZES
    if family_for(kind).routing is not None:
        heads = {"num_key_value_heads": 2} if kind == "deepseek_v2" else {}
        sizes = {**SIZES, **MIXTURE_SIZES, **heads}
    made: PreTrainedModel = HEADS[head].from_config(AutoConfig.for_model(kind, **sizes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # biases and norms too, and larger than at the start
            torch.nn.init.normal_(parameter, std=0.3)
    made.config.name_or_path = made.name_or_path = ""
    return made


@torch.no_grad()
def shake(model: PreTrainedModel) -> None:
    """Move what is trained, as training would, in place."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def inputs_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return two rows of ids, the second one padded on the right."""
    ids = torch.tensor([[5, 17, 3, 9, 22, 8, 1], [4, 11, 6, 1, 0, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0, 7, 19], [0, 13, 2]])
    return inputs


@torch.no_grad()
def output(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits (of a head that has two: side by side), computed and given in float64; the model is changed."""
    made = model.double()(**inputs)
    logits = (
        made.logits if hasattr(made, "logits") else torch.stack([made.start_logits, made.end_logits], dim=-1)
    )
    return logits.double().contiguous()


if __name__ == "__main__":
    sys.exit(main())
