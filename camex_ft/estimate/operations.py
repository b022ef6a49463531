"""Multiply-adds of a forward pass, by purpose, and the rate of a CPU.

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
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from camex_ft.estimate.survey import Batch, Survey
from camex_ft.moe.layers.expert_linear import ExpertLinear
from camex_ft.moe.layers.ffn import ExpertFFN, MergedFFN, MixtureFFN
from camex_ft.moe.layers.low_rank_expert_linear import LowRankLinear
from camex_ft.moe.merging.functional import Shape, cheaper, counts

TFLOPS = 10.0  # 10^12 operations a second that a GPU sustains, assumed
PROBE, REPEATS = 1024, 5


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
    parts = dict.fromkeys(("maps", "routers", "merging", "curvature", "chain"), 0.0)
    for ffn in dense.ffns:
        tokens = dense.tokens(ffn.path)
        if ffn.path not in layers:
            area = sum(weight.numel() for weight, _ in ffn.weights.values())
            parts["maps"] += batch.rows * tokens * ffn.experts_of_token * area
            continue
        for part, count in _of_layer(layers[ffn.path], tokens, batch).items():
            parts[part] += count
    a_token = {part: count / batch.tokens for part, count in parts.items()}
    return Operations(outside=outside / batch.length, **a_token)


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
    used, experts, mixture = layer.settings.top_k, layer.settings.experts, isinstance(layer, MixtureFFN)
    parts = dict.fromkeys(("maps", "merging", "curvature", "chain"), 0.0)
    parts["routers"] = float(groups * sum(p.numel() for p in layer.router.parameters() if p.dim() == 2))
    for linear in layer.linears.values():
        area = linear.in_features * linear.out_features
        if isinstance(linear, LowRankLinear):
            thin = rank_of(linear) * (linear.in_features + linear.out_features)
            if mixture:
                parts["maps"] += used * batch.rows * tokens * (area + thin)
            else:
                parts["maps"] += groups * length * (area + experts * thin)
        elif mixture:
            parts["maps"] += used * batch.rows * tokens * area
        else:
            shape = shape_of(linear, layer, groups, length)
            form = cheaper(shape)
            count = counts(form, shape)
            without_base = form == "mix" and not layer.settings.base
            parts["maps"] += count["token"] - (batch.rows * tokens * area if without_base else 0)
            parts["merging"] += count.get("sum", 0.0)
            times = batch.steps if shares_vectors(linear, batch) else 1
            parts["curvature"] += counts("curve", shape)["factor"] / times
            propagation = layer.propagation if isinstance(layer, MergedFFN) else None
            if propagation is not None and propagation.following is not None:
                # N passes over the matrices for a sum, N^2 for a Gram matrix
                parts["chain"] += (experts + (experts**2 if layer.settings.rule.bargains else 0)) * area
    return parts


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
