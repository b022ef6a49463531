"""Multiply-adds of a forward pass in training, by what they are for, a token of the input.

    outside     products with matrices outside the feed-forward layers, 2 L a for each attention's scores and values
    maps        products of tokens with the maps of feed-forward layers: dense, merged, or of k experts
                of low rank: the base's, and N r' (in + out), the factors' of all N
    routers     pooled inputs with W_g, and W_n where noise is drawn
    merging     N out in for each map and group of tokens: E_hat is made
    curvature   R N out in F for each map, once a step of all its micro-batches
    chain       N out in for each carried map once a micro-batch, and N^2 out in where a Gram matrix is made

Products of matrices alone are counted, over all positions (padding, and what a causal mask hides, included): biases,
norms, activations, softmax and look-ups are not, nor LoRA on attention and curvature of factors of low rank, which are
small. Whether a map is merged or mixed is decided as in a run (`moe.merging.cost_model`).
"""

from __future__ import annotations

from dataclasses import dataclass

from camex_ft.estimate.survey import Batch, Survey
from camex_ft.moe.layers.expert_linear import ExpertLinear
from camex_ft.moe.layers.ffn import ExpertFFN, MergedFFN, MixtureFFN
from camex_ft.moe.layers.low_rank_expert_linear import LowRankLinear
from camex_ft.moe.merging.cost_model import Shape, cheaper, counts


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


def operations(found: Survey, layers: dict[str, ExpertFFN]) -> Operations:
    """Return what one forward pass takes.

    Args:
        found: the dense backbone.
        layers: those of its feed-forward layers that have experts, by path.
    """
    batch = found.batch
    outside = sum(p.tokens * p.out * p.width for p in found.products)
    outside += sum(2 * a.queries * a.keys * a.width for a in found.attentions)
    dense, parts = 0, dict.fromkeys(("maps", "routers", "merging", "curvature", "chain"), 0.0)
    for ffn in found.ffns:
        tokens = found.tokens(ffn.path)
        if ffn.path not in layers:
            dense += tokens * sum(weight.numel() for weight, _ in ffn.weights.values())
            continue
        for part, count in _layer(layers[ffn.path], tokens, batch).items():
            parts[part] += count / batch.tokens
    parts["maps"] += dense / batch.length
    return Operations(outside=outside / batch.length, **parts)


def groups_of(layer: ExpertFFN, tokens: int, rows: int) -> tuple[int, int]:
    """Return into how many groups, of how many tokens, a layer puts `rows` rows of `tokens` tokens."""
    grouping = layer.settings.grouping
    if grouping.granularity == "token":
        return rows * tokens, 1
    size = min(grouping.segment, tokens) if grouping.granularity == "segment" else tokens
    return rows * -(-tokens // size), size


def linears_of(layer: ExpertFFN) -> list[ExpertLinear]:
    """Return the maps of a layer."""
    return [child for child in layer.children() if isinstance(child, ExpertLinear)]


def shape_of(linear: ExpertLinear, layer: ExpertFFN, groups: int, length: int) -> Shape:
    """Return what the cost of a map depends on, for groups of tokens."""
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
    """Return whether domain vectors are made once for all micro-batches of a step, and kept between them."""
    if batch.steps == 1 or not linear.keep_vectors:
        return False
    keep = linear.rule.keep(training=True, seed=0, device=linear.experts.device)
    return linear.curvature is not None or (keep is not None and not keep.pointwise)


def _layer(layer: ExpertFFN, tokens: int, batch: Batch) -> dict[str, float]:
    """Return the parts of one layer with experts, of a whole micro-batch."""
    groups, length = groups_of(layer, tokens, batch.rows)
    made = {"routers": float(groups * sum(p.numel() for p in layer.router.parameters() if p.dim() == 2))}
    made |= dict.fromkeys(("maps", "merging", "curvature", "chain"), 0.0)
    made["maps"] += batch.rows * sum(
        _thin(linear, layer, tokens, groups * length // batch.rows)
        for linear in layer.linears.values()
        if isinstance(linear, LowRankLinear)
    )
    for linear in linears_of(layer):
        shape = shape_of(linear, layer, groups, length)
        area = shape.out * shape.width
        if isinstance(layer, MixtureFFN):
            made["maps"] += layer.settings.top_k * batch.rows * tokens * area
            continue
        form = cheaper(shape)
        count = counts(form, shape)
        bare = form == "mix" and not layer.settings.base  # no base expert beside the k
        made["maps"] += count["token"] - (batch.rows * tokens * area if bare else 0)
        made["merging"] += count.get("sum", 0.0)
        made["curvature"] += counts("curve", shape)["factor"] / (
            batch.steps if shares_vectors(linear, batch) else 1
        )
        made["chain"] += _passed_on(layer) * area
    return made


def _thin(linear: LowRankLinear, layer: ExpertFFN, tokens: int, length: int) -> int:
    """Return the multiply-adds of a row with one map of low-rank experts, `length` tokens with filled-up groups."""
    ends = linear.in_features + linear.out_features
    area = linear.in_features * linear.out_features
    if isinstance(layer, MixtureFFN):
        return layer.settings.top_k * tokens * (area + linear.low_rank.rank * ends)
    return length * (area + linear.count * rank_of(linear) * ends)


def rank_of(linear: LowRankLinear) -> int:
    """Return r' of experts of low rank, to which curvature adds terms."""
    curvature = linear.curvature
    terms = 1 if curvature is None or curvature.kind == "low-rank" else curvature.factors.rank
    return terms * linear.low_rank.rank


def _passed_on(layer: ExpertFFN) -> int:
    """Return the passes over matrices that the next layer's base expert takes: N for a sum, N^2 for a Gram matrix."""
    link = layer.link if isinstance(layer, MergedFFN) else None
    if link is None or link.following is None:
        return 0
    experts = layer.settings.experts
    return experts + (experts**2 if layer.settings.rule.bargains else 0)
