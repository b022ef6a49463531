"""Computations and saved tensors of a dense backbone in one training step, found without running it.

`survey` lists the matrices, attentions, norms and dropouts of a model on any device, and the number of tokens that
reach each. `GradientFlow` says which of its modules are trained and which a gradient passes through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from camex_ft.backbones import DenseFFN, family_of

FLOAT, HALF, BYTE = 4, 2, 1  # bytes
# Names of the query's projection, and how many projections are in one; names of the key's and the value's.
QUERIES = {"q": 1, "query": 1, "q_lin": 1, "q_proj": 1, "c_attn": 3, "query_key_value": 3}
KEYS, VALUES = ("k", "key", "k_lin", "k_proj"), ("v", "value", "v_lin", "v_proj")
CROSS = ("EncDecAttention", "crossattention")
POOLED = ("pooler", "classifier", "pre_classifier", "classification_head")  # read one token of a row
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
class Precision:
    """Number format, kernels and optimizer of a step, as far as memory depends on them.

    Attributes:
        half: under bf16 or fp16 autocast.
        gpu: with the kernels of a GPU.
        checkpointing: blocks are run again in the backward pass.
        optimizer: the Trainer's name for it.
    """

    half: bool = False
    gpu: bool = False
    checkpointing: bool = False
    optimizer: str = "adamw_torch_fused"

    @property
    def size(self) -> int:
        """Bytes of a number that a matrix reads."""
        return HALF if self.half else FLOAT

    @property
    def mask(self) -> int:
        """Bytes of an entry of a dropout mask."""
        return BYTE if self.gpu else self.size


@dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix outside the feed-forward layers, [out, width], that `tokens` of a row meet.

    Attributes:
        saves_input: its input is saved for the backward pass, and not by a neighbour that reads the same.
        vocabulary: its outputs are the logits of a language model.
    """

    path: str
    tokens: int
    out: int
    width: int
    saves_input: bool = True
    vocabulary: bool = False


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention.

    Attributes:
        queries, keys: tokens of a row that attend and that are attended to.
        width, key_width: of queries and of keys, all heads together.
        heads: how many.
        biased: learned biases are added to its scores (T5).
        dropout: probability on its weights.
        fused: its implementation is a kernel that need not save the scores.
    """

    path: str
    queries: int
    keys: int
    width: int
    key_width: int
    heads: int
    biased: bool
    dropout: float
    fused: bool

    def saves_scores(self, precision: Precision) -> bool:
        """Return whether scores are saved: on a CPU the fused kernel takes neither dropout nor learned biases."""
        return not self.fused or (not precision.gpu and bool(self.dropout or self.biased))


@dataclass(frozen=True, kw_only=True)
class Pointwise:
    """A norm or a dropout, which saves `numbers` for each of a row's `tokens`: floats, or entries of a dropout `mask`.

    Of them, only the gradient of a norm's own weight needs those `for_weight`.
    """

    path: str
    tokens: int
    numbers: int
    for_weight: int = 0
    mask: bool = False


@dataclass(frozen=True, kw_only=True)
class Survey:
    """All of a dense backbone. `ffns` are its feed-forward layers, `hidden` the width of the stream between blocks."""

    batch: Batch
    products: tuple[Product, ...]
    attentions: tuple[Attention, ...]
    pointwise: tuple[Pointwise, ...]
    ffns: tuple[DenseFFN, ...]
    hidden: int

    def tokens(self, path: str) -> int:
        """Return the tokens of a row that reach the module at `path`."""
        return _tokens(path, self.batch)


def survey(model: PreTrainedModel, batch: Batch) -> Survey:
    """Return the computations of a dense model of a known family in one step over `batch`."""
    ffns = tuple(family_of(model).ffns(model))
    inside = tuple(f"{path}." for ffn in ffns for path in (ffn.path, *ffn.silence))
    outside = {
        path: module for path, module in model.named_modules() if path and not f"{path}.".startswith(inside)
    }
    attentions = {path: a for path, m in outside.items() if (a := _attention(path, m, model, batch))}
    hidden = ffns[0].hidden_size
    return Survey(
        batch=batch,
        products=tuple(_products(model, outside, attentions, batch)),
        attentions=tuple(attentions.values()),
        pointwise=tuple(_pointwise(outside, attentions, hidden, batch)),
        ffns=ffns,
        hidden=hidden,
    )


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


def _attention(path: str, module: nn.Module, model: PreTrainedModel, batch: Batch) -> Attention | None:
    """Return the attention that a module is, or None where it has no projection of queries."""
    shapes = {name: shape for name, child in module.named_children() if (shape := _shape(child))}
    query = next((name for name in QUERIES if name in shapes), None)
    key = next((name for name in KEYS if name in shapes), None)
    if query is None:
        return None
    config = model.config
    width = shapes[query][0] // QUERIES[query]
    dropout = next((getattr(config, name) for name in ATTENTION_DROPOUT if hasattr(config, name)), None)
    return Attention(
        path=path,
        queries=_tokens(path, batch),
        keys=batch.length if _crosses(path) else _tokens(path, batch),
        width=width,
        key_width=width if key is None else shapes[key][0],
        heads=next((getattr(config, name) for name in HEADS if hasattr(config, name)), 1),
        biased=hasattr(module, "has_relative_attention_bias") and not _crosses(path),
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
            # all cross-attentions read one encoder's output
            saves_input=not beside or (crossing and not encoded),
            vocabulary=module is head,
        )
        encoded = encoded or crossing


def _pointwise(
    outside: dict[str, nn.Module], attentions: dict[str, Attention], hidden: int, batch: Batch
) -> Iterator[Pointwise]:
    for path, module in outside.items():
        parent, _, name = path.rpartition(".")
        tokens = _tokens(path, batch)
        if isinstance(module, nn.Dropout):
            of_scores = parent in attentions and name != "resid_dropout"  # counted with the scores
            if module.p and parent and not of_scores:
                twice = hasattr(outside.get(parent), "final_layer_norm")  # T5's stacks drop at both ends
                yield Pointwise(path=path, tokens=tokens, numbers=hidden * (2 if twice else 1), mask=True)
        elif type(module).__name__.endswith("Norm"):
            weight: Any = getattr(module, "weight", None)
            numbers = 0 if weight is None else weight.numel()
            if parent in attentions and name in ("q_norm", "k_norm"):
                numbers = attentions[parent].width if name == "q_norm" else attentions[parent].key_width
            fused = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
            again = 0 if fused else numbers  # written out in Python, it saves its input twice
            yield Pointwise(path=path, tokens=tokens, numbers=numbers + again, for_weight=again)


class GradientFlow:
    """Modules that are trained, and modules that a gradient passes through, by the paths of the dense model.

    A gradient passes through the modules after the first trained parameter of its stack, in the order of the modules; a
    decoder's cross-attention passes one on to its encoder.
    """

    def __init__(self, model: nn.Module) -> None:
        order = {path: place for place, (path, _) in enumerate(model.named_modules())}
        # modules that hold a trained parameter themselves, and all around them
        owners = [
            path for path, m in model.named_modules() if any(p.requires_grad for p in m.parameters(False))
        ]
        self._trained = {prefix for path in owners for prefix in _prefixes(path)}
        self._last = {prefix: place for path, place in order.items() for prefix in _prefixes(path)}
        self._splits = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self._first = {}  # place of the first trained module: of the encoder, of the decoder
        for decoder in (False, True):
            begins = [path for path in owners if self._decodes(path) == decoder or "." not in path]
            begins += [p for p in order if decoder and p.rpartition(".")[2] in CROSS][:1]
            self._first[decoder] = min((order[path] for path in begins), default=len(order))

    def learns(self, path: str) -> bool:
        """Return whether anything in the module at `path` is trained."""
        return path in self._trained

    def passes(self, path: str) -> bool:
        """Return whether a gradient is wanted at the module's output."""
        return path not in self._last or self._last[path] >= self._first[self._decodes(path)]

    def _decodes(self, path: str) -> bool:
        return self._splits and "decoder" in path.split(".")


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
