"""The merged linear map y_g = x_g E_hat_g^T: forward and backward, without a [G, N, out, in] tensor.

    T_i     = keep_i * M_i tau_i,   tau_i = E_i - E_m          the same for every group         [N, out, in]
    E_hat_g = E_m + alpha * sum_i s_gi T_i                                                      [G, out, in]

`domain_vectors` computes T and takes its gradient back, `merge_weights` and `mix_outputs` are two exact forms of the
product, and `cost_model` chooses between them. Saved for the backward pass: x, s and the parameters; T and E_hat are
recomputed, unless T is `Shared`. A group is a sequence, a segment or a token, as the layer's grouping says.
`merged_linear_and_mean` also returns the mean of T over the experts, which dynamic merging (`base_expert`) takes to the
next layer; its gradient joins that of T.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from camex_ft.moe.curvature.base import Factors
from camex_ft.moe.merging.caching import Shared
from camex_ft.moe.merging.cost_model import Form, Shape, cheaper, curves_once
from camex_ft.moe.merging.domain_vectors import Keep, Recipe, Weigh
from camex_ft.moe.merging.merge_weights import Gradients, merge_backward, merge_forward
from camex_ft.moe.merging.mix_outputs import Mix, mix_backward, mix_forward
from camex_ft.moe.merging.reference import merged_linear_traced, traced
from camex_ft.moe.merging.source import Call, Gathered, Source, select


class MergedLinear(torch.autograd.Function):
    """`merged_linear` with its hand-written backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        base: Tensor | None,
        call: Call,
        *factors: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weights, experts, base, *factors)
        ctx.set_materialize_grads(False)
        ctx.call = call
        recipe = Recipe(experts, base, call.keep, call.factors(factors))
        source, s = Source(recipe, call).make(), weights.to(experts.dtype)
        if call.form == "mix":
            y = mix_forward(_mix(x, s, source))
        else:
            columns = select(s, call.active, dim=1)
            y = merge_forward(x, columns, base, source.part, experts.shape[1], call.alpha)
        return (y, source.mean()) if call.mean else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dmean: Tensor | None = None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # may be asked for once alone
        # who calls backward may still be under autocast
        with torch.autocast(device_type=saved[0].device.type, enabled=False):
            return MergedLinear._gradients(ctx, saved, dy, dmean)

    @staticmethod
    def _gradients(
        ctx: Any, tensors: tuple[Tensor, ...], dy: Tensor | None, dmean: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weights, experts, base, *saved = tensors
        if dy is None:  # the mean alone was used
            dy = x.new_zeros(*x.shape[:2], experts.shape[1])
        x_needed, weights_needed, experts_needed, base_needed, _, *factors_needed = ctx.needs_input_grad
        call: Call = ctx.call
        recipe = Recipe(experts, base, call.keep, call.factors(saved))
        learn, domain = any(factors_needed), experts_needed or (base is not None and base_needed)
        s = weights.to(experts.dtype)
        into = Gradients(
            torch.zeros_like(x) if x_needed else None,
            torch.zeros_like(s) if weights_needed else None,
            torch.empty_like(base) if base is not None and base_needed else None,
        )
        source = Source(recipe, call)
        gathered = Gathered(source, into.base) if learn or domain else None
        dexperts: Tensor | None = None
        dfactors: Iterable[Tensor] | None = None
        if gathered is not None and call.once and learn:
            _backward(dy, x, s, source, Gradients(None, None, into.base), gathered)
            gathered.mean(dmean)
            dexperts, dfactors = gathered.back(learn=True, domain=domain, once=True)
            _backward(dy, x, s, source, into._replace(base=None), None)
        else:
            _backward(dy, x, s, source.make(), into, gathered)
            if gathered is not None:
                gathered.mean(dmean)
                dexperts, dfactors = gathered.back(learn=learn, domain=domain, once=False)
        dweights = into.weights
        if dweights is not None:
            dweights = (dweights.where(s != 0, 0) if call.sparse else dweights).to(weights.dtype)
        return (
            into.x,
            dweights,
            dexperts if experts_needed else None,
            into.base,
            None,
            *([None] * len(saved) if dfactors is None else dfactors),
        )


def _backward(
    dy: Tensor, x: Tensor, s: Tensor, source: Source, into: Gradients, gathered: Gathered | None
) -> None:
    """Take dy back through the product: to `into`, and dT to `gathered`."""
    call = source.call
    if call.form == "mix":
        mix_backward(dy, _mix(x, s, source), into, gathered)
        return
    columns = select(s, call.active, dim=1)
    dcolumns = None if into.weights is None else torch.zeros_like(columns)
    take = None if gathered is None else gathered.rows
    some = into._replace(weights=dcolumns)
    merge_backward(dy, x, columns, source.recipe.base, source.part, call.alpha, some, take)
    if into.weights is not None and dcolumns is not None:
        into.weights[:, slice(None) if call.active is None else call.active] = dcolumns


def _mix(x: Tensor, weights: Tensor, source: Source) -> Mix:
    recipe, call = source.recipe, source.call
    return Mix(x, weights, recipe.base, source.vector, recipe.experts.shape[1], call.alpha, call.sparse)


def merged_linear(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    base: Tensor | None,
    *,
    alpha: float = 1.0,
    keep: Weigh | None = None,
    factors: Factors | None = None,
    sparse: bool = False,
    form: Form | Literal["auto"] = "auto",
    shared: Shared | None = None,
    last: bool = True,
) -> Tensor:
    """Return y = x E_hat^T with E_hat = E_m + alpha * sum_i s_i keep_i(tau) * M_i tau_i.

    Args:
        x: inputs; [G, L, in]. Its dtype, or autocast's, is that of the products with x; merging is in the experts'.
        weights: routing weights s: [G, N], one merged expert a group, or [G, L, N], one a token.
        experts: E_i; [N, out, in].
        base: E_m; [out, in]; None merges the experts themselves: E_hat = alpha * sum_i s_i E_i.
        alpha: merging step size.
        keep: the protocol's multiplier on domain vectors, constant for the gradient. It is called again in the backward
            pass and must then return the same.
        factors: of the curvature M; None is the identity.
        sparse: zeros among the weights, of top-k routing, are constants: they have no gradient and cost no work.
        form: of the product, or "auto", the one that the cost model predicts to be faster.
        shared: T, made before by `transform` from the same experts, base, keep and factors.
        last: where T is shared: whether the backward pass takes the gradient of T, summed over all calls that share it,
            back to experts, base and factors. Before that they have no gradient through T.

    Returns:
        [G, L, out], in the dtype of the products.
    """
    call = Options(alpha, Keep.of(keep), factors, sparse, form, shared, last)
    return _run(x, weights, experts, base, call)[0]


def merged_linear_and_mean(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    base: Tensor | None,
    *,
    alpha: float = 1.0,
    factors: Factors | None = None,
    sparse: bool = False,
    form: Form | Literal["auto"] = "auto",
    shared: Shared | None = None,
    last: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return y and 1/N sum_i M_i tau_i [out, in], the mean over all experts, routed to or not.

    Arguments as those of `merged_linear`; without a protocol's multiplier.
    """
    y, mean = _run(x, weights, experts, base, Options(alpha, None, factors, sparse, form, shared, last, True))
    assert mean is not None
    return y, mean


class Options(NamedTuple):
    """Arguments of `merged_linear` beside its tensors, and whether the mean of T is wanted."""

    alpha: float
    keep: Keep | None
    factors: Factors | None
    sparse: bool
    form: Form | Literal["auto"]
    shared: Shared | None
    last: bool
    mean: bool = False


def _run(
    x: Tensor, weights: Tensor, experts: Tensor, base: Tensor | None, given: Options
) -> tuple[Tensor, Tensor | None]:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if traced():
        with torch.autocast(device_type=device, enabled=False):
            return merged_linear_traced(
                x, weights, experts, base, alpha=given.alpha, keep=given.keep, factors=given.factors
            )
    lead = x.shape[:2]
    if weights.dim() == 3:  # every token is a group
        x, weights = x.flatten(0, 1).unsqueeze(1), weights.flatten(0, 1)  # [G * L, 1, in], [G * L, N]
    shape = _shape(x, weights, experts, given.factors, given.sparse)
    form = cheaper(shape) if given.form == "auto" else given.form
    some = given.sparse and given.shared is None and device == "cpu" and not given.mean
    curved = form == "merge" and given.shared is None and given.factors is not None
    call = Call(
        alpha=given.alpha,
        keep=given.keep,
        sparse=given.sparse,
        shared=given.shared,
        last=given.last,
        form=form,
        active=_used(weights) if some else None,
        once=curved and curves_once(shape),
        mean=given.mean,
        kind=None if given.factors is None else type(given.factors),
    )
    with torch.autocast(device_type=device, enabled=False):
        made = MergedLinear.apply(x, weights, experts, base, call, *(given.factors or ()))
    y, mean = made if given.mean else (made, None)
    return y.view(*lead, -1), mean


def _shape(x: Tensor, weights: Tensor, experts: Tensor, factors: Factors | None, sparse: bool) -> Shape:
    groups, length, width = x.shape
    count, out = experts.shape[:2]
    used: float = count
    if sparse and x.device.type == "cpu":
        used = float(weights.detach().count_nonzero()) / max(1, groups)
    return Shape(
        groups=groups,
        length=length,
        out=out,
        width=width,
        experts=count,
        used=used,
        rank=0 if factors is None else factors.rank,
        factors=0 if factors is None else factors.cost,
    )


def _used(weights: Tensor) -> list[int] | None:
    """Return the experts that any group uses; None where all are used."""
    used: list[int] = (weights.detach() != 0).any(0).nonzero().squeeze(1).tolist()
    return None if len(used) == weights.shape[1] else used
