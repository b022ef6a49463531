"""Computations and saved tensors of a dense backbone in one training step: products, attention, norms.

    model on any device --survey--> [Product], [Attention], [Kept], [DenseFFN]

Nothing is run: a module counts once for every token that reaches it, so that a model on the meta device will do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from camex_ft.backbones import DenseFFN, family_of

# Names of the query's projection, and how many projections are in one; of the others.
QUERIES = {"q": 1, "query": 1, "q_lin": 1, "q_proj": 1, "c_attn": 3, "query_key_value": 3}
KEYS, VALUES = ("k", "key", "k_lin", "k_proj"), ("v", "value", "v_lin", "v_proj")
CROSS = ("EncDecAttention", "crossattention")
POOLED = ("pooler", "classifier", "pre_classifier", "classification_head")  # see one token of a row
HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads")
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows and tokens that one training step reads at a time.

    Attributes:
        rows: B.
        length: L, input tokens of a row.
        target: tokens of a row that a decoder beside an encoder reads; 0 without one.
        steps: micro-batches of an optimizer step.
    """

    rows: int
    length: int
    target: int = 0
    steps: int = 1

    @property
    def tokens(self) -> int:
        """Input tokens of the batch."""
        return self.rows * self.length


@dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix outside the feed-forward layers: tokens of a row that meet it, its shape, and where it stands.

    Attributes:
        keeps: its input is kept for the backward pass, and not because of a neighbour with the same input.
        vocabulary: its outputs are logits of a language model.
    """

    path: str
    tokens: int
    out: int
    width: int
    keeps: bool = True
    vocabulary: bool = False


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention: tokens of a row that ask and that are asked, widths of queries and of keys, heads.

    Attributes:
        biased: learned biases are added to its scores (T5).
        dropout: probability on its weights.
        fused: its implementation is a kernel that need not keep the scores.
    """

    path: str
    queries: int
    keys: int
    width: int
    keyed: int
    heads: int
    biased: bool
    dropout: float
    fused: bool


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Numbers that a norm keeps for every token, `weighed` of them for its own weight, or that a dropout masks."""

    path: str
    tokens: int
    numbers: int
    mask: bool = False
    weighed: int = 0


@dataclass(frozen=True, kw_only=True)
class Survey:
    """All of a dense backbone. `ffns` are its feed-forward layers, `hidden` the width of the stream between blocks."""

    batch: Batch
    products: tuple[Product, ...]
    attentions: tuple[Attention, ...]
    kept: tuple[Kept, ...]
    ffns: tuple[DenseFFN, ...]
    hidden: int

    def tokens(self, path: str) -> int:
        """Return the tokens of a row that reach the module at `path`."""
        return _tokens(path, self.batch)


def survey(model: PreTrainedModel, batch: Batch) -> Survey:
    """Return what a dense model of a known family computes in one step over `batch`."""
    ffns = tuple(family_of(model).ffns(model))
    inside = tuple(f"{path}." for ffn in ffns for path in (ffn.path, *ffn.silence))
    outside = {
        path: module for path, module in model.named_modules() if not f"{path}.".startswith(inside) and path
    }
    attentions = {path: made for path, m in outside.items() if (made := _attention(path, m, model, batch))}
    return Survey(
        batch=batch,
        products=tuple(_products(model, outside, attentions, batch)),
        attentions=tuple(attentions.values()),
        kept=tuple(_kept(outside, attentions, ffns, batch)),
        ffns=ffns,
        hidden=ffns[0].hidden_size,
    )


def block_of(path: str) -> str:
    """Return the block that a module is in: its path up to the first number; "" outside of all blocks."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if at is None else ".".join(parts[: at + 1])


def _tokens(path: str, batch: Batch) -> int:
    parts = path.split(".")
    if any(part in POOLED for part in parts):
        return 1
    if batch.target and ("decoder" in parts or parts[0] == "lm_head"):
        return batch.target
    return batch.length


def _shape(module: Any) -> tuple[int, int] | None:
    """Return (out, in) of a matrix, or None for another module."""
    if isinstance(module, Conv1D):
        return int(module.nf), int(module.nx)
    return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else None


def _first(module: Any, names: Any) -> tuple[str, tuple[int, int]] | None:
    for name in names:
        shape = _shape(getattr(module, name, None))
        if shape is not None:
            return name, shape
    return None


def _attention(path: str, module: nn.Module, model: PreTrainedModel, batch: Batch) -> Attention | None:
    query, key = _first(module, QUERIES), _first(module, KEYS)
    if query is None:
        return None
    config, crosses = model.config, _crosses(path)
    width = query[1][0] // QUERIES[query[0]]
    dropout = next((getattr(config, name) for name in ATTENTION_DROPOUT if hasattr(config, name)), None)
    biased = hasattr(module, "has_relative_attention_bias")
    return Attention(
        path=path,
        queries=_tokens(path, batch),
        keys=batch.length if crosses else _tokens(path, batch),
        width=width,
        keyed=width if key is None else key[1][0],
        heads=next((getattr(config, name) for name in HEADS if hasattr(config, name)), 1),
        biased=biased and not crosses,
        dropout=float(dropout if dropout is not None else getattr(config, "dropout_rate", 0.0)),
        fused=config._attn_implementation != "eager",
    )


def _crosses(path: str) -> bool:
    return any(part in CROSS for part in path.split("."))


def _products(
    model: PreTrainedModel, outside: dict[str, nn.Module], attentions: dict[str, Attention], batch: Batch
) -> Iterator[Product]:
    head = model.get_output_embeddings()
    encoded = False
    for path, module in outside.items():
        shape = _shape(module)
        if shape is None:
            continue
        parent, _, name = path.rpartition(".")
        beside = parent in attentions and name in (*KEYS, *VALUES)
        crossing = beside and _crosses(parent)
        yield Product(
            path=path,
            tokens=batch.length if crossing else _tokens(path, batch),
            out=shape[0],
            width=shape[1],
            keeps=not beside or (crossing and not encoded),  # all cross attentions read one encoder's output
            vocabulary=module is head,
        )
        encoded = encoded or crossing


def _kept(
    outside: dict[str, nn.Module],
    attentions: dict[str, Attention],
    ffns: tuple[DenseFFN, ...],
    batch: Batch,
) -> Iterator[Kept]:
    for path, module in outside.items():
        kind, parent, name = type(module).__name__, *_split(path)
        if isinstance(module, nn.Dropout):
            weights = parent in attentions and name != "resid_dropout"  # counted with the scores
            if module.p and not weights and parent:
                twice = hasattr(outside.get(parent), "final_layer_norm")  # T5's stacks drop at both ends
                yield Kept(
                    path=path,
                    tokens=_tokens(path, batch),
                    numbers=ffns[0].hidden_size * (2 if twice else 1),
                    mask=True,
                )
        elif kind.endswith("Norm"):
            size: Any = getattr(module, "weight", None)
            numbers = 0 if size is None else size.numel()
            if parent in attentions and name in ("q_norm", "k_norm"):
                here = attentions[parent]
                numbers = here.width if name == "q_norm" else here.keyed
            once = isinstance(module, (nn.LayerNorm, nn.RMSNorm))  # others are written out, and keep x twice
            yield Kept(
                path=path,
                tokens=_tokens(path, batch),
                numbers=numbers * (1 if once else 2),
                weighed=0 if once else numbers,
            )


def _split(path: str) -> tuple[str, str]:
    parent, _, name = path.rpartition(".")
    return parent, name
