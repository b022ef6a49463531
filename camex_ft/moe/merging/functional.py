"""The merged product y_g = x_g E_hat_g^T, without a [G, N, out, in] tensor, and its hand-written backward pass.

    T_i     = multiplier_i * M_i tau_i,   tau_i = E_i - E_m    the same for every group         [N, out, in]
    E_hat_g = E_m + alpha * sum_i s_gi T_i                                                      [G, out, in]

`domain_vectors` computes T and takes its gradient back; `merge_weights` and `mix_outputs` are two exact forms of the
product. Saved for the backward pass: x, s and the parameters; T and E_hat are recomputed, unless T is cached. A group
is a sequence, a segment or a token, as the layer's grouping says.

The form is chosen by a cost model. The time of one call, forward and backward, is a sum of counts, each times a rate in
nanoseconds (`RATES`); with area = out in:

    merge     token   G L area         products with x and dy
              slice   G area           E_hat and H, written and read once for each group
              sum     G N area         sums over the experts
              vector  N area           experts, T and its gradient, read and written
    mix       token   (1 + k) G L area
              vector  N area
    curve     factor  R N area (a1 + a2 + c1 + c2)        curvature, beside either form
              vector  N area

The rate of curvature is that of Kronecker products. Curvature costs the same beside either form, so that it only
decides `transforms_once`, which gains nothing where curvature is as cheap as that of the other kinds.

The rates are constants of the package and not measured on the user's machine: a choice that varied from run to run
would change the rounding, and with it the bits, of a run that is repeated or resumed. Only their ratios decide.
`camex-ft bench cost` measures and fits them; docs/cost.md says how well they predict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from camex_ft.moe.merging.domain_vectors import DomainVectors, DomainVectorsGradient, Form, MergedProduct
from camex_ft.moe.merging.merge_weights import Gradients, merge_backward, merge_forward
from camex_ft.moe.merging.mix_outputs import mix_backward, mix_forward
from camex_ft.moe.merging.reference import merged_linear_traced

Part = Literal["merge", "mix", "curve"]


def traced() -> bool:
    """Return whether `torch.export` or a transform of `torch.func` follows the operations."""
    # torch.func has no public test; torch's own `autograd.Function.apply` calls the same function (2.13)
    return torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()


class MergedLinear(torch.autograd.Function):
    """`merged_linear` with its hand-written backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        base: Tensor | None,
        product: MergedProduct,
        *factors: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weights, experts, base, *factors)
        ctx.set_materialize_grads(False)
        ctx.product = product
        vectors = DomainVectors(product)
        form = mix_forward if product.form == "mix" else merge_forward
        y = form(x, weights.to(experts.dtype), vectors)
        if not product.with_mean:
            return y
        assert product.multiplier is None, "the mean is that of domain vectors without a multiplier"
        mean = (experts if vectors.whole is None else vectors.whole).mean(0)
        return y, mean if base is None or vectors.whole is not None else mean.sub_(base)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dmean: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, weights, *tensors = ctx.saved_tensors  # checkpointing recomputes these once
        # the caller of backward may be under autocast
        with torch.autocast(device_type=x.device.type, enabled=False):
            product = ctx.product.with_tensors(*tensors)
            return _gradients(x, weights, product, dy, dmean, ctx.needs_input_grad)


def _gradients(
    x: Tensor,
    weights: Tensor,
    product: MergedProduct,
    dy: Tensor | None,
    dmean: Tensor | None,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the arguments of `MergedLinear.forward`, None where they are not `needed`."""
    experts, base = product.experts, product.base
    x_needed, weights_needed, experts_needed, base_needed, _, *factors_needed = needed
    if dy is None:  # only the mean was used
        dy = x.new_zeros(*x.shape[:2], experts.shape[1])
    learn, domain = any(factors_needed), experts_needed or (base is not None and base_needed)
    s = weights.to(experts.dtype)
    into = Gradients(
        torch.zeros_like(x) if x_needed else None,
        torch.zeros_like(s) if weights_needed else None,
        torch.empty_like(base) if base is not None and base_needed else None,
    )
    once = product.once and learn
    vectors = DomainVectors(product, compute=not once)
    dvectors = DomainVectorsGradient(vectors, into.base) if learn or domain else None
    dexperts: Tensor | None = None
    dfactors: Iterable[Tensor | None] | None = None
    form = mix_backward if product.form == "mix" else merge_backward
    if dvectors is not None and once:
        form(dy, x, s, vectors, Gradients(None, None, into.base), dvectors)
        dvectors.add_mean(dmean)
        dexperts, dfactors = dvectors.pull_back(learn=True, domain=domain, once=True)
        form(dy, x, s, vectors, into._replace(base=None), None)
    else:
        form(dy, x, s, vectors, into, dvectors)
        if dvectors is not None:
            dvectors.add_mean(dmean)
            dexperts, dfactors = dvectors.pull_back(learn=learn, domain=domain, once=False)
    ds = into.weights
    if ds is not None:
        ds = (ds.where(s != 0, 0) if product.sparse else ds).to(weights.dtype)
    dfactors = [None] * len(factors_needed) if dfactors is None else dfactors
    return into.x, ds, dexperts if experts_needed else None, into.base, None, *dfactors


def merged_linear(x: Tensor, weights: Tensor, product: MergedProduct) -> Tensor:
    """Return y = x E_hat^T with E_hat = E_m + alpha * sum_i s_i multiplier_i(tau) * M_i tau_i.

    Args:
        x: inputs; [G, L, in]. Its dtype, or autocast's, is that of the products with x; merging is in the experts'.
        weights: routing weights s: [G, N], one merged expert a group, or [G, L, N], one a token.
        product: experts, base, multiplier, curvature and settings.

    Returns:
        [G, L, out], in the dtype of the products.
    """
    return _apply(x, weights, product)[0]


def merged_linear_and_mean(x: Tensor, weights: Tensor, product: MergedProduct) -> tuple[Tensor, Tensor]:
    """Return y and 1/N sum_i M_i tau_i [out, in], the mean over all experts, routed to or not.

    Dynamic merging (`base_expert`) takes the mean to the next layer; its gradient joins that of T. Arguments as those
    of `merged_linear`; the product has no multiplier.
    """
    y, mean = _apply(x, weights, replace(product, with_mean=True))
    assert mean is not None
    return y, mean


def _apply(x: Tensor, weights: Tensor, product: MergedProduct) -> tuple[Tensor, Tensor | None]:
    """Settle how the product is computed, and compute it."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device_type=device, enabled=False):
        if traced():
            return merged_linear_traced(x, weights, product)
        lead = x.shape[:2]
        if weights.dim() == 3:  # every token is a group
            x, weights = x.flatten(0, 1).unsqueeze(1), weights.flatten(0, 1)  # [G * L, 1, in], [G * L, N]
        factors, alone = product.factors, product.cached is None
        shape = _shape(x, weights, product)
        form = product.form or cheaper(shape)
        active = None
        if product.sparse and alone and device == "cpu" and not product.with_mean:
            active = _used(weights)
        once = False
        if form == "merge" and alone and factors is not None and torch.is_grad_enabled():
            once = transforms_once(replace(shape, rank=factors.rank, factors=factors.cost))
        product = replace(product, form=form, active=active, once=once)
        output = MergedLinear.apply(x, weights, product.experts, product.base, product, *(factors or ()))
    y, mean = output if product.with_mean else (output, None)
    return y.view(*lead, -1), mean


def _used(weights: Tensor) -> list[int] | None:
    """Return the experts that any group uses; None where all are used."""
    used: list[int] = (weights.detach() != 0).any(0).nonzero().squeeze(1).tolist()
    return None if len(used) == weights.shape[1] else used


# -- choice of the form -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes that the cost of one call depends on.

    Attributes:
        groups, length: G groups of L tokens.
        out, width: of the map.
        experts, used: N, and how many a group uses on average.
        rank, factors: R of the curvature and the multiply-adds of each term and entry, a1 + a2 + c1 + c2 for Kronecker
            products (`Factors.cost`); 0 without.
    """

    groups: int
    length: int
    out: int
    width: int
    experts: int
    used: float
    rank: int = 0
    factors: int = 0


# ns a count; 2 cores with AVX-512, float32: results/bench/cost-768x3072-float32-cpu.json
RATES: Mapping[Part, Mapping[str, float]] = {
    "merge": {"token": 0.04572, "slice": 1.04, "sum": 0.01771, "vector": 4.012},
    "mix": {"token": 0.03732, "vector": 3.277},
    "curve": {"factor": 0.1135, "vector": 0.0},
}


def _shape(x: Tensor, weights: Tensor, product: MergedProduct) -> Shape:
    """Return the sizes that the choice between the forms depends on."""
    groups, length, width = x.shape
    count, out = product.experts.shape[:2]
    used: float = count
    if product.sparse and x.device.type == "cpu":
        used = float(weights.detach().count_nonzero()) / max(1, groups)
    return Shape(groups=groups, length=length, out=out, width=width, experts=count, used=used)


def counts(part: Part, shape: Shape) -> dict[str, float]:
    """Return the counts that the time of one part is the weighted sum of."""
    area = shape.out * shape.width
    tokens = shape.groups * shape.length * area
    vectors = shape.experts * area
    if part == "merge":
        return {
            "token": tokens,
            "slice": shape.groups * area,
            "sum": shape.groups * vectors,
            "vector": vectors,
        }
    if part == "mix":
        return {"token": (1 + shape.used) * tokens, "vector": vectors}
    return {"factor": shape.rank * vectors * shape.factors, "vector": vectors if shape.rank else 0}


def predict(form: Form, shape: Shape, rates: Mapping[Part, Mapping[str, float]] = RATES) -> float:
    """Return the predicted time of a forward and a backward pass, in seconds on the machine of the rates."""
    total = 0.0
    parts: tuple[Part, ...] = (form, "curve")
    for part in parts:
        total += sum(rates[part][name] * count for name, count in counts(part, shape).items())
    return total * 1e-9


def cheaper(shape: Shape) -> Form:
    """Return the form that is predicted to be faster."""
    return "mix" if predict("mix", shape) < predict("merge", shape) else "merge"


def transforms_once(shape: Shape) -> bool:
    """Return whether the backward pass should compute T while it takes dT back, and so v1 to v3 once (`kronecker`).

    H is then computed twice: first for dT, without T, and again for ds.
    """
    merge, curve = counts("merge", shape), counts("curve", shape)
    saved = RATES["curve"]["factor"] * curve["factor"] / 7  # 3 of about 20 products
    return saved > RATES["merge"]["token"] * merge["token"] / 3 + RATES["merge"]["slice"] * merge["slice"] / 4
