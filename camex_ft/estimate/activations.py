"""Activations that autograd saves in a forward pass, and working memory of the backward pass, by formula.

With e bytes a number (2 under autocast, else 4) and T tokens, a forward pass saves

    matrix         T in e                  its input, where it is trained; once where several read the same
    attention      T (a + 2 keys) e        queries, keys, values; its output is the next matrix's input
                   + T heads 4             fused: the sums of the softmax; or, written out (and for T5's biases),
                   + T heads L 4           weights, and with dropout a mask and the weights that are left
    norm           T d 4, or twice         LayerNorm; root mean square written out, once where it is not trained
    feed-forward   T (d + f) e             inputs of both maps, + T f e for each further step of activation and gate
    dropout        T d                     mask, a byte on a GPU and a float on a CPU
    head           T V 4                   log-probabilities of a language model
    merged layer   as dense                x and s are saved, E_hat is made again: nothing of size B out in
    low rank       as dense, trained, + 2 T N r' e a map       the input of A', and both sides of s_i
                   + 2 N r' (out + in) 4   where curvature makes B' and A'
    base expert    out in 4                of each map that gets it from the layer before
    mixture        k (feed-forward + T d e)

Weights cast for autocast count once, parameters themselves not. Modules before the first trained parameter of their
stack save nothing, and a frozen matrix does not save its input. Beside saved tensors, a step needs

    logits          2 T V 4                    their gradient, and that of their log-probabilities
    feed-forward    T (2 f + d) e              gradients on both sides of the activation
    attention       2 T heads L 4              those of the scores, where they are written out
    merged map      slices of E_hat, T and dT, all of T where curvature makes it (`moe.merging`)
    curvature       tau, three products and their way back, of as many experts as fit (`moe.curvature.kronecker`)

On a CPU the buffers of merged maps are used again and stay (`moe.workspace`); the largest of each counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from torch import nn

from camex_ft.backbones import DenseFFN, SparseFFN
from camex_ft.backbones.base import block_of
from camex_ft.estimate.operations import groups_of, linears_of, rank_of, shape_of
from camex_ft.estimate.survey import (
    FLOAT,
    HALF,
    KEYS,
    QUERIES,
    VALUES,
    Attention,
    GradientFlow,
    Precision,
    Survey,
)
from camex_ft.moe.curvature.kronecker import BLOCK_ELEMENTS
from camex_ft.moe.layers.expert_linear import ExpertLinear
from camex_ft.moe.layers.ffn import ExpertFFN, MixtureFFN
from camex_ft.moe.layers.low_rank_expert_linear import LowRankLinear
from camex_ft.moe.merging.domain_vectors import Form
from camex_ft.moe.merging.functional import cheaper
from camex_ft.moe.merging.merge_weights import SLICES

# Tensors of the inner size that activations save beside their output; others save their input.
WRITTEN_OUT = {"NewGELUActivation": 4, "QuickGELUActivation": 2, "FastGELUActivation": 6, "ReLU": 0}
CURVED = 2  # B' and A', and the tensors that they come from
CHUNKS = {"kronecker": 8}  # tensors as large as domain vectors in a curvature's backward pass; 1 in others


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Bytes that a forward pass saves.

    Attributes:
        blocks: by block, in the order of the model.
        stream: input of each block, which is saved under gradient checkpointing.
        outside: outside of all blocks, less `logits`.
        logits: log-probabilities of a language model, the last that is saved and the first that is freed.
        fixed: present throughout the step: propagated base experts, weights cast for autocast.
    """

    blocks: Mapping[str, float]
    stream: Mapping[str, float]
    outside: float
    logits: float
    fixed: float

    @property
    def total(self) -> float:
        """All of it, without gradient checkpointing."""
        return self.until_backward(checkpointing=False) + self.logits

    def until_backward(self, *, checkpointing: bool) -> float:
        """Return the bytes, less `logits`, that stay until the backward pass."""
        held = self.stream if checkpointing else self.blocks
        return self.outside + self.fixed + sum(held.values())

    def checkpointed(self) -> float:
        """Return the bytes under gradient checkpointing: the inputs of blocks, and everything of the largest block."""
        largest = max(self.blocks.values(), default=0.0)
        return self.until_backward(checkpointing=True) + self.logits + largest


def saved(dense: Survey, layers: Mapping[str, ExpertFFN], precision: Precision, model: nn.Module) -> Saved:
    """Return the bytes that one forward pass saves.

    Args:
        dense: the dense backbone.
        layers: those of its feed-forward layers that have experts, by path.
        precision: of the step.
        model: with experts or dense, whose frozen parts save less.
    """
    flow, rows = GradientFlow(model), dense.batch.rows
    # in the order of the model; "" is outside of all blocks
    blocks: dict[str, float] = {block: 0.0 for p in dense.products if (block := block_of(p.path))}
    stream: dict[str, float] = {}
    outside = 0.0
    for path, tokens, size in chain(_modules(dense, precision, flow), _ffns(dense, layers, precision, flow)):
        block = block_of(path)
        if block:
            blocks[block] = blocks.get(block, 0.0) + rows * size
            stream[block] = rows * tokens * dense.hidden * FLOAT
        else:
            outside += rows * size
    return Saved(
        blocks=blocks,
        stream=stream,
        outside=outside,
        logits=sum(rows * p.tokens * p.out * FLOAT for p in dense.products if p.vocabulary),
        fixed=sum(map(_of_parameters, layers.values())) + _casts(dense, layers, precision),
    )


def _modules(dense: Survey, precision: Precision, flow: GradientFlow) -> Iterator[tuple[str, int, float]]:
    """Yield (path, tokens of a row, bytes a row) of matrices, attentions, norms and dropouts."""
    for product in dense.products:
        parent, _, name = product.path.rpartition(".")
        readers = [product.path]
        if name in (*QUERIES, *KEYS, *VALUES):  # an attention's projections read the same input
            readers = [f"{parent}.{other}" for other in (*QUERIES, *KEYS, *VALUES)]
        if product.saves_input and any(map(flow.learns, readers)):
            yield product.path, product.tokens, product.tokens * product.width * precision.size
    for attention in dense.attentions:
        if flow.passes(attention.path):
            yield attention.path, attention.queries, _attended(attention, precision)
    for module in dense.pointwise:
        if flow.passes(module.path):
            numbers = module.numbers - (0 if flow.learns(module.path) else module.for_weight)
            size = precision.mask if module.mask else FLOAT
            yield module.path, module.tokens, module.tokens * numbers * size


def _ffns(
    dense: Survey, layers: Mapping[str, ExpertFFN], precision: Precision, flow: GradientFlow
) -> Iterator[tuple[str, int, float]]:
    """Yield the same of feed-forward layers."""
    for ffn in dense.ffns:
        if not flow.passes(ffn.path):
            continue
        tokens, layer = dense.tokens(ffn.path), layers.get(ffn.path)
        length, times, size = tokens, 1, 0.0
        if isinstance(layer, MixtureFFN) or (layer is None and isinstance(ffn, SparseFFN)):
            times = ffn.experts_of_token if layer is None else layer.settings.top_k
            size = times * tokens * ffn.hidden_size * precision.size
        elif layer is not None:
            groups, group_length = groups_of(layer, tokens, 1)
            length = groups * group_length  # a last segment is filled up
        learns = flow.learns(ffn.path) or any(map(flow.learns, ffn.silence))
        size += times * length * fed_forward(ffn, precision, learns=learns)
        size += 0.0 if layer is None else _low_rank(layer, length, times, precision)
        size += tokens * ffn.hidden_size * precision.mask if ffn.outer_dropout else 0
        yield ffn.path, tokens, size


def _low_rank(layer: ExpertFFN, length: int, times: int, precision: Precision) -> float:
    """Return the bytes a row that experts of low rank save beside the dense layer."""
    total = 0.0
    for linear in layer.linears.values():
        if not isinstance(linear, LowRankLinear):
            continue
        if isinstance(layer, MixtureFFN):
            total += times * length * 2 * linear.low_rank.rank * precision.size
            continue
        total += length * 2 * linear.count * rank_of(linear) * precision.size
        total += 0 if linear.low_rank.dropout == 0 else length * linear.in_features * 2 * precision.size
    return total


def _attended(attention: Attention, precision: Precision) -> float:
    """Return the bytes a row that an attention saves."""
    a = attention
    scores = a.queries * a.heads * a.keys * FLOAT
    if a.saves_scores(precision):
        masked = a.queries * a.heads * a.keys * (precision.mask + FLOAT) if a.dropout else 0
        return (a.queries + 2 * a.keys) * a.width * precision.size + scores + masked
    sums = a.queries * a.heads * FLOAT
    inputs = (a.queries * a.width + 2 * a.keys * a.key_width) * precision.size
    return inputs + sums + (scores if a.biased else 0)


def fed_forward(ffn: DenseFFN, precision: Precision, *, learns: bool = True) -> float:
    """Return the bytes that a token leaves in a dense or merged feed-forward layer."""
    steps = WRITTEN_OUT.get(type(ffn.activation).__name__, 1)
    units = (1 if learns or not steps else 0) + steps + (2 if ffn.gated else 0)
    if ffn.inner_dropout and not steps and not ffn.gated and learns:
        units += 1  # the activation saves its result, which `down` no longer reads
    masked = ffn.inner_size * precision.mask if ffn.inner_dropout else 0
    return ((ffn.hidden_size if learns else 0) + units * ffn.inner_size) * precision.size + masked


def _of_parameters(layer: ExpertFFN) -> int:
    """Return the bytes that depend on parameters alone: propagated base experts, low-rank factors under curvature."""
    numbers = sum(linear.experts[0].numel() for linear in linears_of(layer) if linear.propagated)
    for linear in layer.linears.values():
        if isinstance(linear, LowRankLinear) and linear.curvature is not None:
            numbers += CURVED * linear.count * rank_of(linear) * (linear.in_features + linear.out_features)
    return FLOAT * numbers


def _casts(dense: Survey, layers: Mapping[str, ExpertFFN], precision: Precision) -> int:
    """Return the bytes of weights in half precision, which autocast holds for the backward pass."""
    if not precision.half:
        return 0
    numbers = sum(p.out * p.width for p in dense.products)
    for ffn in dense.ffns:
        layer = layers.get(ffn.path)
        if layer is None:
            numbers += ffn.numbers
        elif isinstance(layer, MixtureFFN):
            numbers += sum(linear.experts.numel() for linear in linears_of(layer))
    return HALF * numbers


# -- working memory ---------------------------------------------------------------------------------------------------


def workspace_bytes(dense: Survey, layers: Mapping[str, ExpertFFN], precision: Precision) -> int:
    """Return the bytes of the buffers that merged maps use in turn: the largest of each kind."""
    largest: dict[str, int] = defaultdict(int)
    for ffn in dense.ffns:
        layer = layers.get(ffn.path)
        if layer is None or isinstance(layer, MixtureFFN):
            continue
        groups, length = groups_of(layer, dense.tokens(ffn.path), dense.batch.rows)
        for linear in linears_of(layer):
            cheap = cheaper(shape_of(linear, layer, groups, length))
            for kind, numbers in _buffers(linear, groups, length, cheap, gpu=precision.gpu).items():
                largest[kind] = max(largest[kind], numbers)
    return FLOAT * sum(largest.values())


def _buffers(linear: ExpertLinear, groups: int, length: int, form: Form, *, gpu: bool) -> dict[str, int]:
    """Return the numbers in each kind of buffer of one map."""
    experts, out, width = linear.experts.shape
    device, multiplier = "cuda" if gpu else "cpu", linear.rule.multiplier
    buffers = {}
    if linear.curvature is not None or (multiplier is not None and not multiplier.pointwise):
        buffers["vectors"] = experts * out * width
    if form == "merge":  # slices of E_hat, of T and of its gradient
        most, budget = next(kind[1:] for kind in SLICES[device] if length >= kind[0])
        together = min(groups, most)
        height = min(out, max(16, budget // (together * width) // 16 * 16))
        buffers["slices"] = (together + 2 * experts + 1) * height * width
    if linear.curvature is not None:
        count = max(1, min(experts, BLOCK_ELEMENTS[device] // (out * width)))
        buffers["curvature"] = CHUNKS.get(linear.curvature.kind, 1) * count * out * width
    return buffers


def backward_bytes(dense: Survey, layers: Mapping[str, ExpertFFN], precision: Precision) -> dict[str, float]:
    """Return by block the bytes that its backward pass needs beside saved activations."""
    rows, size = dense.batch.rows, precision.size
    needed: dict[str, float] = defaultdict(float)
    for ffn in dense.ffns:
        layer, block = layers.get(ffn.path), block_of(ffn.path)
        times = layer.settings.top_k if isinstance(layer, MixtureFFN) else 1
        times = ffn.experts_of_token if layer is None else times
        tokens = times * rows * dense.tokens(ffn.path)
        needed[block] = max(needed[block], tokens * (2 * ffn.inner_size + ffn.hidden_size) * size)
    for a in dense.attentions:
        scores = 2 * a.heads * a.keys * FLOAT if a.saves_scores(precision) else 0
        block = block_of(a.path)
        needed[block] = max(needed[block], rows * a.queries * (scores + 3 * a.width * size))
    return needed
