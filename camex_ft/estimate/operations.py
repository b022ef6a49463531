"""Multiply-adds of a forward pass, by purpose, and of a training step.

A forward pass in training takes, a token of the input,

    outside     products with matrices outside the feed-forward layers, 2 L a for each attention's scores and values
    maps        products of tokens with the maps of feed-forward layers: dense, merged, or of k experts
                of low rank: the base's, and N r' (in + out), the factors' of all N
    routers     pooled inputs with W_g, and W_n where noise is drawn
    merging     N out in for each map and group of tokens: E_hat is made
    curvature   R N out in F for each map, once a step of all its micro-batches
    chain       N out in for each propagated base expert once a micro-batch, and N^2 out in for a Gram matrix

Products of matrices alone are counted, over all positions (padding and masked ones included): biases,
norms, activations, softmax and look-ups are not, nor LoRA on attention and curvature of factors of low rank, which are
small. The counts equal those of `torch.utils.flop_counter` (`tests/estimate/test_operations.py`). Whether a map is
merged or mixed is decided as in a run (`moe.merging.functional`).

In a training step a matrix costs its multiply-adds once forward, once for the gradient of its input, once for its own
where it is trained, and once more under gradient checkpointing. Merged maps and curvature cost what
`moe.merging.functional` says, in units of its rate for products with tokens: those ratios were measured on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from camex_ft.estimate.survey import Batch, GradientFlow, Precision, Survey
from camex_ft.moe.layers.expert_linear import ExpertLinear
from camex_ft.moe.layers.ffn import ExpertFFN, MergedFFN, MixtureFFN
from camex_ft.moe.layers.low_rank_expert_linear import LowRankLinear
from camex_ft.moe.merging.functional import RATES, Shape, cheaper, counts, predict

TFLOPS = 10.0  # 10^12 operations a second that a GPU sustains, assumed
PROBE, REPEATS = 1024, 5
PASSES = 3.0  # of a layer with experts: forward, and two gradients


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Multiply-adds a token of the input; see the module. `total` is their sum."""

    outside: float
    maps: float
    routers: float = 0.0
    merging: float = 0.0
    curvature: float = 0.0
    chain: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.outside + self.maps + self.routers + self.merging + self.curvature + self.chain


def operations(dense: Survey, layers: Mapping[str, ExpertFFN]) -> Operations:
    """Return the multiply-adds of one forward pass.

    Args:
        dense: the dense backbone.
        layers: those of its feed-forward layers that have experts, by path.
    """
    batch = dense.batch
    outside = sum(p.tokens * p.out * p.width for p in dense.products)
    outside += sum(2 * a.queries * a.keys * a.width for a in dense.attentions)
    unmerged, parts = 0, dict.fromkeys(("maps", "routers", "merging", "curvature", "chain"), 0.0)
    for ffn in dense.ffns:
        tokens = dense.tokens(ffn.path)
        if ffn.path not in layers:
            unmerged += tokens * sum(weight.numel() for weight, _ in ffn.weights.values())
            continue
        for part, count in _of_layer(layers[ffn.path], tokens, batch).items():
            parts[part] += count / batch.tokens
    parts["maps"] += unmerged / batch.length
    return Operations(outside=outside / batch.length, **parts)


def groups_of(layer: ExpertFFN, tokens: int, rows: int) -> tuple[int, int]:
    """Return into how many groups, of how many tokens, a layer puts `rows` rows of `tokens` tokens."""
    grouping = layer.settings.grouping
    if grouping.granularity == "token":
        return rows * tokens, 1
    size = min(grouping.segment, tokens) if grouping.granularity == "segment" else tokens
    return rows * -(-tokens // size), size


def linears_of(layer: ExpertFFN) -> list[ExpertLinear]:
    """Return the maps of a layer whose experts are whole matrices."""
    return [child for child in layer.children() if isinstance(child, ExpertLinear)]


def shape_of(linear: ExpertLinear, layer: ExpertFFN, groups: int, length: int) -> Shape:
    """Return the sizes that the cost of a map depends on, for groups of tokens."""
    experts, out, width = linear.experts.shape
    factors = None if linear.curvature is None else linear.curvature.factors
    return Shape(
        groups=groups,
        length=length,
        out=out,
        width=width,
        experts=experts,
        used=layer.settings.top_k,
        rank=0 if factors is None else factors.rank,
        factors=0 if factors is None else factors.cost,
    )


def shares_vectors(linear: ExpertLinear, batch: Batch) -> bool:
    """Return whether transformed domain vectors are cached from micro-batch to micro-batch of a step."""
    if batch.steps == 1 or not linear.keep_vectors:
        return False
    multiplier = linear.rule.multiplier
    return linear.curvature is not None or (multiplier is not None and not multiplier.pointwise)


def rank_of(linear: LowRankLinear) -> int:
    """Return r' of experts of low rank, to which curvature adds terms."""
    curvature = linear.curvature
    terms = 1 if curvature is None or curvature.kind == "low-rank" else curvature.factors.rank
    return terms * linear.low_rank.rank


def _of_layer(layer: ExpertFFN, tokens: int, batch: Batch) -> dict[str, float]:
    """Return the parts of one layer with experts, of a whole micro-batch."""
    groups, length = groups_of(layer, tokens, batch.rows)
    parts = dict.fromkeys(("maps", "merging", "curvature", "chain"), 0.0)
    parts["routers"] = float(groups * sum(p.numel() for p in layer.router.parameters() if p.dim() == 2))
    padded = groups * length // batch.rows  # tokens of a row, its last segment filled up
    low_rank = [linear for linear in layer.linears.values() if isinstance(linear, LowRankLinear)]
    parts["maps"] += batch.rows * sum(_of_low_rank(linear, layer, tokens, padded) for linear in low_rank)
    for linear in linears_of(layer):
        shape = shape_of(linear, layer, groups, length)
        area = shape.out * shape.width
        if isinstance(layer, MixtureFFN):
            parts["maps"] += layer.settings.top_k * batch.rows * tokens * area
            continue
        form = cheaper(shape)
        count = counts(form, shape)
        without_base = form == "mix" and not layer.settings.base
        parts["maps"] += count["token"] - (batch.rows * tokens * area if without_base else 0)
        parts["merging"] += count.get("sum", 0.0)
        times = batch.steps if shares_vectors(linear, batch) else 1
        parts["curvature"] += counts("curve", shape)["factor"] / times
        parts["chain"] += _propagating(layer) * area
    return parts


def _of_low_rank(linear: LowRankLinear, layer: ExpertFFN, tokens: int, padded: int) -> int:
    """Return the multiply-adds of a row with one map of low-rank experts."""
    ends = linear.in_features + linear.out_features
    area = linear.in_features * linear.out_features
    if isinstance(layer, MixtureFFN):
        return layer.settings.top_k * tokens * (area + linear.low_rank.rank * ends)
    return padded * (area + linear.count * rank_of(linear) * ends)


def _propagating(layer: ExpertFFN) -> int:
    """Return the passes over matrices that the next layer's base expert takes: N for a sum, N^2 for a Gram matrix."""
    propagation = layer.propagation if isinstance(layer, MergedFFN) else None
    if propagation is None or propagation.following is None:
        return 0
    experts = layer.settings.experts
    return experts + (experts**2 if layer.settings.rule.bargains else 0)


# -- a step ----------------------------------------------------------------------------------------------------------


def step_operations(
    model: nn.Module, dense: Survey, layers: Mapping[str, ExpertFFN], precision: Precision
) -> float:
    """Return the multiply-adds of an optimizer step, forward and backward, of its micro-batches together.

    Args:
        model: with experts or dense, on any device.
        dense: the dense backbone.
        layers: those of its feed-forward layers that have experts, by path.
        precision: of the step.
    """
    flow, again = GradientFlow(model), int(precision.checkpointing)

    def passes(path: str) -> int:
        return 1 + again + int(flow.passes(path)) + int(flow.learns(path))

    total = sum(p.tokens * p.out * p.width * passes(p.path) for p in dense.products)
    for a in dense.attentions:  # both factors of its products have a gradient, where there is one
        total += 2 * a.queries * a.keys * a.width * (1 + again + 2 * flow.passes(a.path))
    with_experts = 0.0
    for ffn in dense.ffns:
        tokens = dense.tokens(ffn.path)
        if ffn.path in layers:
            with_experts += _layer_step(layers[ffn.path], dense.batch.rows, tokens, PASSES + again)
        else:
            area = sum(weight.numel() for weight, _ in ffn.weights.values())
            total += tokens * passes(ffn.path) * area
    return (dense.batch.rows * total + with_experts) * dense.batch.steps


def _layer_step(layer: ExpertFFN, rows: int, tokens: int, passes: float) -> float:
    """Return the multiply-adds of a layer with experts in a micro-batch, or as many as take the same time."""
    total = 0.0
    groups, length = groups_of(layer, tokens, rows)
    mixture, used = isinstance(layer, MixtureFFN), layer.settings.top_k
    for linear in layer.linears.values():
        area = linear.in_features * linear.out_features
        if isinstance(linear, LowRankLinear):
            thin = rank_of(linear) * (linear.in_features + linear.out_features)
            bases, experts = (used, used) if mixture else (1, layer.settings.experts)
            total += rows * tokens * ((passes - 1) * bases * area + passes * experts * thin)
        elif mixture:
            total += passes * used * rows * tokens * area
        elif isinstance(linear, ExpertLinear):
            shape = shape_of(linear, layer, groups, length)
            total += passes * predict(cheaper(shape), shape) / (RATES["merge"]["token"] * 1e-9)
    return total


@lru_cache
def measured_tflops(*, half: bool = False) -> float:
    """Return the rate of this machine's CPU in a product of two matrices, in 10^12 operations a second."""
    left = torch.ones(PROBE, PROBE, dtype=torch.bfloat16 if half else torch.float32)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        left @ left
        times.append(time.perf_counter() - started)
    return 2 * PROBE**3 / min(times) / 1e12
