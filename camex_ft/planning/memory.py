"""Memory of one training step on one device, in bytes: weights, gradients, optimizer, activations.

Weights, gradients and the optimizer's state are counted, not estimated: parameters are float32, also under bf16 and
fp16, which are autocast; AdamW holds two moments and a step count of each trained parameter. Statistics that protocols
keep in buffers count as weights.

Activations are an estimate: the tensors that autograd saves in the forward pass, by what the code of each module is
known to keep, with e bytes a number (2 under autocast, else 4) and T tokens:

    matrix         T in e                  its input; once where several read the same
    attention      T (a + 2 keys) e        queries, keys, values; its output is the next matrix's input
                   + T heads 4             fused: the sums of the softmax; or, written out (and for T5's biases),
                   + T heads L 4           weights, and with dropout a mask and the weights that are left
    norm           T d 4, or twice         LayerNorm; root mean square written out
    feed-forward   T (d + f) e             inputs of both maps, + T f e for each further step of activation and gate
    dropout        T d                     mask, a byte on a GPU and a float on a CPU
    head           T V 4                   log-probabilities of a language model
    merged layer   as dense                x and s are saved, E_hat is made again: nothing of size B out in
    carried base   out in 4                of each map of a chain's later layers
    mixture        k (feed-forward + T d e)

Parameters are not among them; weights cast for autocast are, once. With gradient checkpointing a block keeps its input
alone, and one block at a time everything. Not in the estimate: what kernels use while they run, the allocator's
fragments, memory of the framework itself, and that frozen parts save less. A backward pass also needs the gradient of
what it is at, which is small beside the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from camex_ft.backbones import DenseFFN
from camex_ft.moe.ffn import ExpertFFN, MixtureFFN
from camex_ft.planning.operations import groups_of, linears_of, shares_vectors
from camex_ft.planning.survey import Attention, Survey, block_of

FLOAT, HALF, BYTE = 4, 2, 1
MOMENTS = {"sgd": 0, "adagrad": 1, "rmsprop": 1}  # optimizers of the Trainer that hold fewer than AdamW
# What activations keep beside their output, in units of their input; others keep their input.
WRITTEN_OUT = {"NewGELUActivation": 4, "QuickGELUActivation": 2, "FastGELUActivation": 6, "ReLU": 0}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How a step is run.

    Attributes:
        half: under bf16 or fp16 autocast.
        gpu: with the kernels of a GPU.
        checkpointing: blocks are run again in the backward pass.
        optimizer: name of the Trainer's.
    """

    half: bool = False
    gpu: bool = False
    checkpointing: bool = False
    optimizer: str = "adamw_torch"

    @property
    def size(self) -> int:
        """Bytes of a number that a matrix reads."""
        return HALF if self.half else FLOAT

    @property
    def mask(self) -> int:
        """Bytes of a number's place in a dropout mask."""
        return BYTE if self.gpu else self.size


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one training step: `weights` with buffers, `gradients`, `optimizer`, domain `vectors` that are kept from
    micro-batch to micro-batch, and, estimated, `activations`."""

    weights: int
    gradients: int
    optimizer: int
    vectors: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.vectors + self.activations


def memory(model: nn.Module, found: Survey, layers: Mapping[str, ExpertFFN], precision: Precision) -> Memory:
    """Return what one training step of a model holds.

    Args:
        model: with experts or dense, on any device.
        found: the dense backbone.
        layers: those of its feed-forward layers that have experts, by path.
        precision: how the step is run.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    kept = [
        linear
        for layer in layers.values()
        for linear in linears_of(layer)
        if shares_vectors(linear, found.batch)
    ]
    return Memory(
        weights=sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())),
        gradients=gradients,
        optimizer=optimizer_bytes(trained, precision.optimizer),
        vectors=sum(2 * m.experts.numel() * m.experts.element_size() for m in kept),  # T and its gradient
        activations=activations(found, layers, precision),
    )


def optimizer_bytes(trained: list[nn.Parameter], name: str = "adamw_torch") -> int:
    """Return what the optimizer holds of these parameters; those that are not known here count as AdamW."""
    moments = MOMENTS.get(name, 2)
    counts = FLOAT * len(trained) if moments else 0  # of steps
    return sum(moments * p.numel() * p.element_size() for p in trained) + counts


def activations(found: Survey, layers: Mapping[str, ExpertFFN], precision: Precision) -> int:
    """Return the bytes that autograd saves in one forward pass, estimated."""
    by_block: dict[str, float] = defaultdict(float)
    stream: dict[str, float] = {}
    rows = found.batch.rows
    for path, tokens, size in _saved(found, layers, precision):
        block = block_of(path)
        by_block[block] += rows * size
        if block:
            stream[block] = rows * tokens * found.hidden * FLOAT
    outside = by_block.pop("", 0.0)
    fixed = sum(_carried(layer) for layer in layers.values()) + _casts(found, layers, precision)
    if precision.checkpointing and by_block:
        return round(outside + fixed + sum(stream.values()) + max(by_block.values()))
    return round(outside + fixed + sum(by_block.values()))


def _saved(
    found: Survey, layers: Mapping[str, ExpertFFN], precision: Precision
) -> Iterator[tuple[str, int, float]]:
    """Yield (path, tokens of a row, bytes a row) of all that is saved."""
    for product in found.products:
        numbers = product.width * precision.size if product.keeps else 0
        yield (
            product.path,
            product.tokens,
            product.tokens * (numbers + product.vocabulary * product.out * FLOAT),
        )
    for each in found.attentions:
        yield each.path, each.queries, _attended(each, precision)
    for kept in found.kept:
        yield kept.path, kept.tokens, kept.tokens * kept.numbers * (precision.mask if kept.mask else FLOAT)
    for ffn in found.ffns:
        tokens = found.tokens(ffn.path)
        layer = layers.get(ffn.path)
        length = tokens
        times = 1
        if isinstance(layer, MixtureFFN):
            times = layer.settings.top_k
            yield ffn.path, tokens, times * tokens * ffn.hidden_size * precision.size
        elif layer is not None:
            groups, size = groups_of(layer, tokens, 1)
            length = groups * size  # a last segment is filled up
        yield ffn.path, tokens, times * length * _fed_forward(ffn, precision)
        if ffn.outer_dropout:
            yield ffn.path, tokens, tokens * ffn.hidden_size * precision.mask


def _attended(each: Attention, precision: Precision) -> float:
    # on a CPU the fused kernel takes neither dropout nor biases that learn
    fused = each.fused and (precision.gpu or not (each.dropout or each.biased))
    inner = each.queries * each.width + 2 * each.keys * (each.keyed if fused else each.width)
    scores = each.queries * each.heads * each.keys * FLOAT
    if fused:
        sums = each.queries * each.heads * FLOAT
        return inner * precision.size + sums + (scores if each.biased else 0)
    masked = each.queries * each.heads * each.keys * (precision.mask + FLOAT) if each.dropout else 0
    return inner * precision.size + scores + masked


def _fed_forward(ffn: DenseFFN, precision: Precision) -> float:
    """Return the bytes that a token leaves in a dense or merged feed-forward layer."""
    kind = type(ffn.activation).__name__
    units = 1 + WRITTEN_OUT.get(kind, 1) + (2 if ffn.gated else 0)
    if ffn.inner_dropout and not WRITTEN_OUT.get(kind, 1) and not ffn.gated:
        units += 1  # the activation keeps its result, which is not what `down` reads any more
    masked = ffn.inner_size * precision.mask if ffn.inner_dropout else 0
    return (ffn.hidden_size + units * ffn.inner_size) * precision.size + masked


def _carried(layer: ExpertFFN) -> int:
    return sum(m.experts[0].numel() * FLOAT for m in linears_of(layer) if m.carried)


def _casts(found: Survey, layers: Mapping[str, ExpertFFN], precision: Precision) -> int:
    """Return the bytes of weights in half precision, which autocast keeps for the backward pass."""
    if not precision.half:
        return 0
    numbers = sum(p.out * p.width for p in found.products)
    for ffn in found.ffns:
        layer = layers.get(ffn.path)
        if layer is None:
            numbers += sum(weight.numel() for weight, _ in ffn.weights.values())
        elif isinstance(layer, MixtureFFN):
            numbers += sum(m.experts.numel() for m in linears_of(layer))
    return HALF * numbers


def gpu_here() -> bool:
    """Whether a step would run on a GPU on this machine."""
    return torch.cuda.is_available()
