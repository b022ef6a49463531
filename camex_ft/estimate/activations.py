"""Activations that autograd saves in a forward pass, estimated from the code of each module.

With e bytes a number (2 under autocast, else 4) and T tokens:

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
    carried base   out in 4                of each map of a chain's later layers
    mixture        k (feed-forward + T d e)

Parameters are not among them; weights cast for autocast are, once. What comes before the first trained parameter of its
stack saves nothing, and of the rest a frozen matrix does not save its input.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from camex_ft.backbones import DenseFFN
from camex_ft.estimate.flow import Flow
from camex_ft.estimate.operations import groups_of, linears_of, rank_of
from camex_ft.estimate.precision import FLOAT, HALF, Precision
from camex_ft.estimate.survey import KEYS, QUERIES, VALUES, Attention, Survey, block_of
from camex_ft.moe.layers.ffn import ExpertFFN, MixtureFFN
from camex_ft.moe.layers.low_rank_expert_linear import LowRankLinear

# What activations keep beside their output, in units of their input; others keep their input.
WRITTEN_OUT = {"NewGELUActivation": 4, "QuickGELUActivation": 2, "FastGELUActivation": 6, "ReLU": 0}
LARGE = 32 << 20  # bytes; glibc gives larger tensors mappings of their own, which end when they are freed
CURVED = 2  # B' and A', and what they are made of


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Bytes that a forward pass saves.

    Attributes:
        blocks: by block, in the order of the model.
        stream: what a block keeps under gradient checkpointing, its input, by block.
        outside: outside of all blocks, less `logits`.
        logits: log-probabilities of a language model, the last that is saved and the first that is freed.
        fixed: what is there throughout: carried base experts, weights cast for autocast.
        large: what of it is in tensors of more than `LARGE` bytes.
    """

    blocks: Mapping[str, float]
    stream: Mapping[str, float]
    outside: float
    logits: float
    fixed: float
    large: float = 0.0

    @property
    def total(self) -> float:
        """All of it, without gradient checkpointing."""
        return sum(self.blocks.values()) + self.outside + self.logits + self.fixed

    def checkpointed(self) -> float:
        """Return what is left of it with gradient checkpointing, and everything of one block."""
        if not self.blocks:
            return self.total
        most = max(self.blocks.values())
        return self.outside + self.logits + self.fixed + sum(self.stream.values()) + most


def saved(
    found: Survey, layers: Mapping[str, ExpertFFN], precision: Precision, model: nn.Module | None = None
) -> Saved:
    """Return what one forward pass saves.

    Args:
        found: the dense backbone.
        layers: those of its feed-forward layers that have experts, by path.
        precision: how the step is run.
        model: with experts or dense, whose frozen parts save less; None trains everything.
    """
    flow, rows = Flow(model), found.batch.rows
    blocks: dict[str, float] = defaultdict(float)
    stream: dict[str, float] = {}
    for product in found.products:  # in the order of the model
        if (block := block_of(product.path)) and block not in blocks:
            blocks[block] = 0.0
    logits = sum(rows * p.tokens * p.out * FLOAT for p in found.products if p.vocabulary)
    large: float = logits if logits > LARGE else 0
    for path, tokens, size, widest in _saved(found, layers, precision, flow):
        block = block_of(path)
        blocks[block] += rows * size
        large += rows * size if rows * tokens * widest * precision.size > LARGE else 0
        if block:
            stream[block] = rows * tokens * found.hidden * FLOAT
    return Saved(
        outside=blocks.pop("", 0.0),
        blocks=blocks,
        stream=stream,
        logits=logits,
        fixed=sum(map(_of_parameters, layers.values())) + _casts(found, layers, precision),
        large=large,
    )


def _saved(
    found: Survey, layers: Mapping[str, ExpertFFN], precision: Precision, flow: Flow
) -> Iterator[tuple[str, int, float, int]]:
    """Yield (path, tokens of a row, bytes a row, numbers a token of the largest tensor), logits left out."""
    for product in found.products:
        if product.keeps and any(flow.learns(path) for path in _readers(product.path)):
            size = product.tokens * product.width * precision.size
            yield product.path, product.tokens, size, product.width
    for each in found.attentions:
        if flow.passes(each.path):
            widest = max(each.width, each.heads * each.keys if written_out(each, precision) else 0)
            yield each.path, each.queries, _attended(each, precision), widest
    for kept in found.kept:
        if flow.passes(kept.path):
            numbers = kept.numbers if kept.mask or flow.learns(kept.path) else kept.numbers - kept.weighed
            each_ = precision.mask if kept.mask else FLOAT
            yield kept.path, kept.tokens, kept.tokens * numbers * each_, found.hidden
    for ffn in found.ffns:
        if flow.passes(ffn.path):
            tokens = found.tokens(ffn.path)
            for bytes_ in _layer(ffn, layers.get(ffn.path), tokens, precision, flow):
                yield ffn.path, tokens, bytes_, ffn.inner_size


def _readers(path: str) -> list[str]:
    """Return the paths of the matrices that read the same input: an attention's projections, or the one alone."""
    parent, _, name = path.rpartition(".")
    projections = (*QUERIES, *KEYS, *VALUES)
    return [f"{parent}.{each}" for each in projections] if name in projections else [path]


def _layer(
    ffn: DenseFFN, layer: ExpertFFN | None, tokens: int, precision: Precision, flow: Flow
) -> Iterator[float]:
    """Yield bytes a row that a feed-forward layer saves."""
    length, times = tokens, 1
    if isinstance(layer, MixtureFFN):
        times = layer.settings.top_k
        yield times * tokens * ffn.hidden_size * precision.size
    elif layer is not None:
        groups, size = groups_of(layer, tokens, 1)
        length = groups * size  # a last segment is filled up
    learns = flow.learns(ffn.path) or any(flow.learns(path) for path in ffn.silence)
    yield times * length * fed_forward(ffn, precision, learns=learns)
    if layer is not None:
        yield _low_rank(layer, length, times, precision)
    if ffn.outer_dropout:
        yield tokens * ffn.hidden_size * precision.mask


def _low_rank(layer: ExpertFFN, length: int, times: int, precision: Precision) -> float:
    """Return what experts of low rank save beside the dense layer."""
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


def written_out(each: Attention, precision: Precision) -> bool:
    """Return whether scores are kept: on a CPU the fused kernel takes neither dropout nor biases that learn."""
    return not each.fused or (not precision.gpu and bool(each.dropout or each.biased))


def _attended(each: Attention, precision: Precision) -> float:
    fused = not written_out(each, precision)
    inner = each.queries * each.width + 2 * each.keys * (each.keyed if fused else each.width)
    scores = each.queries * each.heads * each.keys * FLOAT
    if fused:
        sums = each.queries * each.heads * FLOAT
        return inner * precision.size + sums + (scores if each.biased else 0)
    masked = each.queries * each.heads * each.keys * (precision.mask + FLOAT) if each.dropout else 0
    return inner * precision.size + scores + masked


def fed_forward(ffn: DenseFFN, precision: Precision, *, learns: bool = True) -> float:
    """Return the bytes that a token leaves in a dense or merged feed-forward layer."""
    kind = type(ffn.activation).__name__
    steps = WRITTEN_OUT.get(kind, 1)
    units = (1 if learns or not steps else 0) + steps + (2 if ffn.gated else 0)
    if ffn.inner_dropout and not steps and not ffn.gated and learns:
        units += 1  # the activation keeps its result, which is not what `down` reads any more
    masked = ffn.inner_size * precision.mask if ffn.inner_dropout else 0
    return ((ffn.hidden_size if learns else 0) + units * ffn.inner_size) * precision.size + masked


def _of_parameters(layer: ExpertFFN) -> int:
    """Return what is made of parameters alone, and saved: carried base experts, curved factors of low rank."""
    carried = sum(m.experts[0].numel() for m in linears_of(layer) if m.carried)
    for linear in layer.linears.values():
        if isinstance(linear, LowRankLinear) and linear.curvature is not None:
            carried += CURVED * linear.count * rank_of(linear) * (linear.in_features + linear.out_features)
    return FLOAT * carried


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
