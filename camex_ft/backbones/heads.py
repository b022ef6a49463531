"""Heads that a backbone can be loaded under, and which of them transformers has for a model type."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

HEADS = {
    "base": transformers.AutoModel,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "multiple-choice": transformers.AutoModelForMultipleChoice,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "causal-lm": transformers.AutoModelForCausalLM,
    "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
}
CLASSIFIERS = ("sequence-classification", "token-classification")


def has_head(kind: type[PreTrainedConfig], head: str) -> bool:
    """Return whether transformers has this head, a key of `HEADS`, for models of a configuration class.

    The mapping itself is asked: iterating over it would import every model of transformers.
    """
    mapping: Any = HEADS[head]._model_mapping
    return kind in mapping


def heads(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the names of the heads that a model with this configuration can have.

    Encoders get no ``causal-lm``: transformers offers them one, but it would see the tokens that it is to predict.
    """
    names = tuple(name for name in HEADS if has_head(type(config), name))
    causal = getattr(config, "is_decoder", False) or config.is_encoder_decoder
    return tuple(name for name in names if name != "causal-lm" or "masked-lm" not in names or causal)


def head_of(model: PreTrainedModel) -> str:
    """Return the head that a dense model has, a key of `HEADS`; "" for none of them."""
    # the mapping itself is asked: iterating over it would import every model of transformers
    mappings: dict[str, Any] = {name: auto._model_mapping for name, auto in HEADS.items()}
    kinds = {name: mapping.get(type(model.config), ()) for name, mapping in mappings.items()}
    named = [n for n, kind in kinds.items() if type(model) in (kind if isinstance(kind, tuple) else (kind,))]
    return named[0] if named else ""


def labels_of(config: PreTrainedConfig, head: str) -> dict[str, Any]:
    """Return the labels of a model's head, as `loading.load` takes them."""
    if head not in CLASSIFIERS:
        return {}
    regression = config.problem_type == "regression"
    return {"regression": True} if regression else {"label_names": list((config.id2label or {}).values())}
