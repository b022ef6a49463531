"""Tiny backbones with random weights: transformers' own classes built from small configurations.

All are 64 wide and 128 inside the feed-forward blocks (8x8 and 8x16 in the curvature's factors), with two
layers and four heads, and learn the embedded tasks from scratch in a minute or two on one CPU core.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from camex_ft.synthetic.tokenizer import MAX_LENGTH, TRAINED_SIZE, Layout, build_tokenizer, train_tokenizer
from camex_ft.utils.errors import UserError, nearest
from camex_ft.utils.registry import EMBEDDED

if TYPE_CHECKING:  # so that listing the tiny backbones needs no torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

WIDTH, INNER, LAYERS, ATTENTION_HEADS = 64, 128, 2, 4
INITIAL = WIDTH**-0.5  # the usual 0.02 suits wider models: at this width training stands still for epochs


@dataclass(frozen=True)
class TinyFamily:
    """A tiny backbone: transformers' `model_type`, its settings, and the tokenizer's layout.

    Attributes:
        model_type: as in transformers' configurations.
        settings: of the configuration.
        layout: of the tokenizer.
        name: in the registry.
        task_heads: heads that it is known to have without asking transformers; not all of them.
        trained_size: tokens of a tokenizer that is trained on a text; a very small text has fewer.
    """

    model_type: str
    settings: dict[str, Any]
    layout: Layout
    name: str = ""
    task_heads: tuple[str, ...] = ()
    trained_size: int = TRAINED_SIZE

    def suits(self, head: str, length: int) -> bool:
        """Return whether it is known to have this head and to read so many tokens; else ask its configuration."""
        return head in self.task_heads and length <= MAX_LENGTH

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads that transformers has for this family."""
        from transformers import AutoConfig

        from camex_ft.backbones.heads import heads

        return heads(AutoConfig.for_model(self.model_type))

    def configuration(
        self,
        *,
        head: str = "sequence-classification",
        num_labels: int = 2,
        texts: Iterable[str] | None = None,
        **label_info: Any,
    ) -> tuple[PreTrainedConfig, PreTrainedTokenizerFast]:
        """Return the configuration of the model and its tokenizer.

        Args:
            head: a key of `backbones.heads.HEADS`.
            num_labels: outputs of a classifier, where no ``id2label`` is given; 1 is a regression.
            texts: what the tokenizer is trained on, in pieces; None gives the one that knows the project's own words.
            label_info: further configuration fields, such as ``id2label``, ``label2id``, ``problem_type``.

        Raises:
            UserError: unknown head, or one that the family does not have.
        """
        from transformers import AutoConfig

        from camex_ft.backbones.heads import CLASSIFIERS

        if head not in self.heads:
            raise UserError(
                f"backbone 'embedded/{self.name}' has no head '{head}'.{nearest(head, self.heads)} "
                f"It has: {', '.join(self.heads)}."
            )
        layout = self.layout.without_end() if head == "causal-lm" else self.layout
        tokenizer = build_tokenizer(layout) if texts is None else train_tokenizer(layout, texts)
        tokens = {
            f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")
        }
        if self.model_type == "t5":
            tokens["decoder_start_token_id"] = tokenizer.pad_token_id
        config = AutoConfig.for_model(
            self.model_type,
            vocab_size=len(tokenizer),
            **{role: token for role, token in tokens.items() if token is not None},
            **self.settings,
            **({"num_labels": num_labels} if head in CLASSIFIERS and "id2label" not in label_info else {}),
            **label_info,
        )
        return config, tokenizer

    def backbone(
        self, *, head: str = "sequence-classification", seed: int = 0, **options: Any
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """Return a model with random weights, in evaluation mode, and its tokenizer.

        Args:
            head, options: as of `configuration`.
            seed: of the weights. The global random state is left as it was.

        Raises:
            UserError: unknown head, or one that the family does not have.
        """
        import torch

        from camex_ft.backbones.heads import HEADS

        config, tokenizer = self.configuration(head=head, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return HEADS[head].from_config(config).eval(), tokenizer


_BERT = Layout(
    {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B:1 [SEP]:1",
    inputs=("input_ids", "token_type_ids", "attention_mask"),
)
_DISTILBERT = Layout(_BERT.special, single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]")
# The ids 0 to 3 are those of the published RoBERTa; its position table counts from the padding id.
_ROBERTA = Layout(
    {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "mask_token": "<mask>",
    },
    single="<s> $A </s>",
    pair="<s> $A </s> </s> $B </s>",
)
_T5 = Layout(
    {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    single="$A </s>",
    pair="$A </s> $B </s>",
)
# The end token closes each text: a causal classifier reads the answer off the last token that is not padding.
_GPT2 = Layout(
    {
        "pad_token": "<|pad|>",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "unk_token": "<|unk|>",
    },
    single="$A <|endoftext|>",
    pair="$A <|endoftext|> $B <|endoftext|>",
)
_LLAMA = Layout(
    {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    single="<s> $A </s>",
    pair="<s> $A </s> $B </s>",
)
_QWEN2 = replace(_LLAMA, byte_level=True)


def _sizes(width: str, inner: str, layers: str, heads: str, positions: str, *dropouts: str) -> dict[str, Any]:
    """Return the settings of a family under its own names for them; nothing is dropped out."""
    sizes = {width: WIDTH, inner: INNER, layers: LAYERS, heads: ATTENTION_HEADS, positions: MAX_LENGTH}
    return {**sizes, **dict.fromkeys(dropouts, 0.0), "initializer_range": INITIAL}


_STANDARD = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_POSITIONS = "max_position_embeddings"
_T5_SETTINGS = {
    "d_model": WIDTH,
    "d_ff": INNER,
    "d_kv": WIDTH // ATTENTION_HEADS,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": ATTENTION_HEADS,
    "dropout_rate": 0.0,
    "classifier_dropout": 0.0,
}
_BERT_SETTINGS = _sizes(*_STANDARD, _POSITIONS, "hidden_dropout_prob", "attention_probs_dropout_prob")
_QWEN2_SETTINGS = {**_sizes(*_STANDARD, _POSITIONS), "num_key_value_heads": ATTENTION_HEADS // 2}
_LLAMA_SETTINGS = {**_QWEN2_SETTINGS, "head_dim": WIDTH // ATTENTION_HEADS}
_DISTILBERT_DROPOUTS = ("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout")
_DISTILBERT_SETTINGS = _sizes("dim", "hidden_dim", "n_layers", "n_heads", _POSITIONS, *_DISTILBERT_DROPOUTS)
_GPT2_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_GPT2_SETTINGS = _sizes("n_embd", "n_inner", "n_layer", "n_head", "n_positions", *_GPT2_DROPOUTS)
_ROBERTA_SETTINGS = {**_BERT_SETTINGS, _POSITIONS: MAX_LENGTH + 2, "type_vocab_size": 1}
_FAMILIES = {
    "t5": TinyFamily("t5", {**_T5_SETTINGS, "feed_forward_proj": "relu"}, _T5),
    "t5-gated": TinyFamily("t5", {**_T5_SETTINGS, "feed_forward_proj": "gated-gelu"}, _T5),
    "bert": TinyFamily("bert", _BERT_SETTINGS, _BERT),
    "roberta": TinyFamily("roberta", _ROBERTA_SETTINGS, _ROBERTA),
    "distilbert": TinyFamily("distilbert", _DISTILBERT_SETTINGS, _DISTILBERT),
    "gpt2": TinyFamily("gpt2", _GPT2_SETTINGS, _GPT2),
    "llama": TinyFamily("llama", _LLAMA_SETTINGS, _LLAMA),
    "mistral": TinyFamily("mistral", {**_LLAMA_SETTINGS, "sliding_window": None}, _LLAMA),
    "qwen2": TinyFamily("qwen2", _QWEN2_SETTINGS, _QWEN2),
}
_TASK_HEADS = {
    "t5": ("sequence-classification", "seq2seq-lm"),
    **dict.fromkeys(("bert", "roberta", "distilbert"), ("sequence-classification",)),
    **dict.fromkeys(("gpt2", "llama", "mistral", "qwen2"), ("sequence-classification", "causal-lm")),
}
for _name, _family in _FAMILIES.items():
    EMBEDDED.add(_name, replace(_family, name=_name, task_heads=_TASK_HEADS[_family.model_type]))


def backbone(family: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return the tiny model of a family and its tokenizer, with the options of `TinyFamily.backbone`.

    Raises:
        UserError: unknown family or head, or a head that the family does not have.
    """
    tiny: TinyFamily = EMBEDDED.get(family)
    return tiny.backbone(**options)
