"""Models from GGUF files: transformers turns their weights back into floating point, and this sees to the rest."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer

from camex_ft.backbones.heads import HEADS
from camex_ft.config import gguf
from camex_ft.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


def where(path: Path) -> dict[str, Any]:
    """Return the arguments by which `from_pretrained` finds the folder, or the GGUF file, at `path`."""
    if not path.is_file():
        return {"pretrained_model_name_or_path": path}
    # with its folder: transformers would look for the bare name in the working folder first
    return {"pretrained_model_name_or_path": path.parent, "gguf_file": str(path)}


def as_plain(model: PreTrainedModel) -> PreTrainedModel:
    """Take back that `model` is quantised: its weights are not, but transformers would neither train nor save it."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
        for module in model.modules():
            getattr(module, "config", model.config).__dict__.pop("_is_quantized", None)
    return model


def only_its_own(tokenizer: PreTrainedTokenizerFast, header: gguf.Header) -> None:
    """Take away, in place, tokens beyond the file's vocabulary.

    For a byte-level vocabulary transformers starts from GPT-2's class, which adds its own end token to one without it:
    a token more than the model embeds.
    """
    count = header.values["tokenizer.ggml.tokens"]
    if len(tokenizer) > count:
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        core["added_tokens"] = [token for token in core["added_tokens"] if token["id"] < count]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(core))


def check_all_read(header: gguf.Header, config: PreTrainedConfig, spec: str) -> None:
    """Compare the file's tensors, by shape, with the parameters of the model that it is to fill.

    Raises:
        UserError: the file has more, such as biases that the model has not: transformers drops them without a word.
    """
    whole = HEADS["seq2seq-lm" if config.is_encoder_decoder else "causal-lm"]
    with torch.device("meta"):
        due = Counter(tuple(sorted(p.shape)) for p in whole.from_config(config).parameters())
    left = Counter(tuple(sorted(tensor.shape)) for tensor in header.tensors) - due
    if left:
        examples = ", ".join(f"{count} of shape {list(shape)}" for shape, count in left.most_common(3))
        raise UserError(
            f"backbone {spec}: the file has {sum(left.values())} tensors that transformers does not read into a "
            f"{config.model_type} model ({examples}), so it would compute something else: expected the same model as "
            "a folder with safetensors weights"
        )
