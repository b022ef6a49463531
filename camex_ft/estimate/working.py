"""Working memory of a step beside what is saved: what kernels and the backward pass use while they run, in bytes.

    logits          2 T V 4                    their gradient, and that of their log-probabilities
    feed-forward    T (2 f + d) e              gradients on both sides of the activation
    attention       2 T heads L 4              those of the scores, where they are written out
    merged map      slices of E_hat, T and dT, all of T where curvature makes it (`moe.merging`)
    curvature       tau, three products and their way back, of as many experts as fit (`moe.curvature.kronecker`)
    optimizer       2 of the largest tensor    where AdamW is not fused
    tied matrix     V d 4                      its gradient as an embedding, before it is added to the head's

On a CPU buffers of merged maps are used again and stay (`moe.workspace`); the greatest of each counts.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from camex_ft.estimate.activations import written_out
from camex_ft.estimate.operations import groups_of, linears_of, shape_of
from camex_ft.estimate.precision import FLOAT, Precision
from camex_ft.estimate.survey import Survey, block_of
from camex_ft.moe.curvature.base import BLOCK_ELEMENTS
from camex_ft.moe.curvature.kronecker import nearest_factors
from camex_ft.moe.layers.expert_linear import ExpertLinear
from camex_ft.moe.layers.ffn import ExpertFFN, MixtureFFN
from camex_ft.moe.merging.cost_model import cheaper
from camex_ft.moe.merging.merge_weights import SLICES

UNFUSED = ("adamw_torch", "adamw_hf")


def scratch(found: Survey, layers: Mapping[str, ExpertFFN], precision: Precision) -> int:
    """Return the bytes of the buffers of all merged maps, the greatest of each name."""
    most: dict[str, int] = {}
    for ffn in found.ffns:
        layer = layers.get(ffn.path)
        if layer is None or isinstance(layer, MixtureFFN):
            continue
        groups, length = groups_of(layer, found.tokens(ffn.path), found.batch.rows)
        for linear in linears_of(layer):
            for name, size in _buffers(linear, layer, groups, length, precision).items():
                most[name] = max(most.get(name, 0), size)
    return FLOAT * sum(most.values())


def _buffers(
    linear: ExpertLinear, layer: ExpertFFN, groups: int, length: int, precision: Precision
) -> dict[str, int]:
    """Return the numbers in each buffer of one map."""
    shape = shape_of(linear, layer, groups, length)
    experts, out, width = linear.experts.shape
    keep = linear.rule.keep(training=True, seed=0, device=linear.experts.device)
    whole = linear.curvature is not None or (keep is not None and not keep.pointwise)
    made = {"vectors": experts * out * width} if whole else {}
    if cheaper(shape) == "mix":
        made |= {} if whole else {"vector": out * width}
    else:
        kinds = SLICES["cuda" if precision.gpu else "cpu"]
        most, budget = next(kind[1:] for kind in kinds if length >= kind[0])
        together = min(groups, most)
        height = min(out, max(16, budget // (together * width) // 16 * 16))
        slice_ = height * width
        made |= {"slice": together * slice_, "dvectors": (experts + 1) * slice_}
        weighed = keep is not None and keep.pointwise
        made |= {"part": experts * slice_} if weighed or not whole else {}
        made |= {"kept": experts * slice_} if weighed else {}
    if linear.curvature is not None:
        made |= _curved(linear, out, width, experts, BLOCK_ELEMENTS["cuda" if precision.gpu else "cpu"])
    return made


def _curved(linear: ExpertLinear, out: int, width: int, experts: int, most: int) -> dict[str, int]:
    """Return the numbers in the buffers of a curvature's backward pass."""
    chunk = max(1, min(experts, most // (out * width))) * out * width
    if linear.curvature is None or linear.curvature.kind != "kronecker":
        return {"tau": chunk}
    p, q = nearest_factors(out)
    u, v = nearest_factors(width)
    count, block = chunk // (out * width), min(chunk, max(most, p * width))
    sums = count * (q * p * p + q * p * u * u + p * q * q) + count * v * v * -(-chunk // block)
    return {"whole": 4 * chunk, "block": 4 * block, "sums": sums}


def transients(found: Survey, layers: Mapping[str, ExpertFFN], precision: Precision) -> dict[str, float]:
    """Return by block what its backward pass needs beside what was saved."""
    rows, e = found.batch.rows, precision.size
    made: dict[str, float] = {}
    for ffn in found.ffns:
        layer = layers.get(ffn.path)
        times = layer.settings.top_k if isinstance(layer, MixtureFFN) else 1
        tokens = rows * found.tokens(ffn.path)
        _most(made, ffn.path, times * tokens * (2 * ffn.inner_size + ffn.hidden_size) * e)
    for each in found.attentions:
        scores = 2 * each.heads * each.keys * FLOAT if written_out(each, precision) else 0
        _most(made, each.path, rows * each.queries * (scores + 3 * each.width * e))
    return made


def _most(made: dict[str, float], path: str, size: float) -> None:
    block = block_of(path)
    made[block] = max(made.get(block, 0.0), size)


def tied(model: nn.Module) -> int:
    """Return the bytes of gradients of one embedding that is used in several places, which are summed."""
    if not isinstance(model, PreTrainedModel):
        return 0
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = getattr(embedding, "weight", None)
    if weight is None or not weight.requires_grad:
        return 0
    uses = 1 + bool(model.config.is_encoder_decoder) + (head is not None and head.weight is weight)
    return (uses - 1) * int(weight.numel()) * FLOAT


def stepping(trained: list[nn.Parameter], optimizer: str) -> int:
    """Return what the optimizer needs while it steps."""
    largest = max((p.numel() for p in trained), default=0)
    return 2 * FLOAT * largest if optimizer in UNFUSED else 0
