"""``camex-ft bench layer``: one linear map with experts, against a dense one and the reference implementation.

    dense     y = x W^T                                         one weight W
    merged    s = router(mean of x), y = ExpertLinear(x, s)     the package's own path
    plain     the same s and parameters through `merged_linear_reference`

One call is a forward and a backward pass, to x and to all parameters; or, with `evaluate`, a forward pass alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from camex_ft.bench.measurement import Side, alternate, medians
from camex_ft.bench.settings import LayerBench
from camex_ft.estimate.measured import extra_memory, in_child
from camex_ft.moe.config import LayerSettings
from camex_ft.moe.context import ForwardState
from camex_ft.moe.layers.expert_linear import ExpertLinear
from camex_ft.moe.merging.caching import ParameterCache
from camex_ft.moe.merging.reference import merged_linear_reference
from camex_ft.moe.routing.router import Router, masked_mean
from camex_ft.utils.registry import PROTOCOLS

SEED = 0
NOISE = 0.1  # of experts around the base and of curvature around the identity, relative
MB = 1e6
SMALL = 32  # sizes of the call that loads libraries before memory is measured


@dataclass(frozen=True)
class LayerProblem:
    """Inputs and parameters that all sides compute with.

    Attributes:
        x: inputs; [B, L, in].
        upstream: gradient of the output; [B, L, out].
        weight: of the dense side; [out, in].
        router, linear: of the merged and the plain side.
        state: of the merged side's forward pass, with a cache for evaluation.
    """

    x: Tensor
    upstream: Tensor
    weight: Tensor
    router: Router
    linear: ExpertLinear
    state: ForwardState = field(default_factory=lambda: ForwardState(parameter_cache=ParameterCache()))

    def leaves(self) -> list[Tensor]:
        """Return all tensors that get a gradient."""
        return [self.x, self.weight, *self.router.parameters(), *self.linear.parameters()]


def make(settings: LayerBench) -> LayerProblem:
    """Return inputs and parameters, the same for the same settings; the global random state stays as it is."""
    protocol, dtype = PROTOCOLS.get(settings.protocol), getattr(torch, settings.dtype)
    out, width = settings.out_features, settings.in_features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        weight = torch.randn(out, width) / width**0.5
        x = torch.randn(settings.batch, settings.length, width)
        upstream = torch.randn(settings.batch, settings.length, out)
        router = Router(
            in_features=width, experts=settings.experts, top_k=settings.k, noise=False, prior=False
        )
        layer_settings = LayerSettings(
            rule=protocol.bind({}),
            experts=settings.experts,
            top_k=settings.k,
            base=protocol.base,
            rank=settings.effective_rank,
            curvature=settings.curvature,
            noise=False,
        )
        linear = ExpertLinear(weight, None, layer_settings)
        _move_apart(linear)
    for module in (router, linear):
        module.to(settings.device).train(not settings.evaluate)
    router.to(torch.promote_types(dtype, torch.float32))  # as the layers keep it
    linear.to(dtype)
    x, upstream, weight = (t.to(settings.device, dtype) for t in (x, upstream, weight))
    return LayerProblem(x.requires_grad_(), upstream, weight.requires_grad_(), router, linear)


@torch.no_grad()
def _move_apart(linear: ExpertLinear) -> None:
    for expert in linear.experts:
        expert.add_(torch.randn_like(expert) * (NOISE * expert.std()))
    if linear.curvature is not None:
        for factor in linear.curvature.parameters():
            factor.add_(torch.randn_like(factor) * (NOISE * factor.shape[-1] ** -0.5))


# -- sides ------------------------------------------------------------------------------------------------------------


def dense(p: LayerProblem) -> Tensor:
    """Return x W^T; [B, L, out]."""
    return F.linear(p.x, p.weight)


def merged(p: LayerProblem) -> Tensor:
    """Return the output of the package's layer; [B, L, out]."""
    output: Tensor = p.linear(p.x, route(p), state=p.state)
    return output


def plain(p: LayerProblem) -> Tensor:
    """Return the same by the reference implementation; [B, L, out]."""
    linear = p.linear
    seed = int(torch.randint(2**62, ()).item()) if linear.random and linear.training else 0
    return merged_linear_reference(p.x, route(p).to(linear.experts.dtype), linear.product(seed=seed))


def route(p: LayerProblem) -> Tensor:
    """Return the routing weights of the batch; [B, N]."""
    weights: Tensor = p.router(masked_mean(p.x, None)).weights
    return weights  # [B, N]


SIDES: dict[str, Callable[[LayerProblem], Tensor]] = {"dense": dense, "merged": merged, "plain": plain}


def sides(settings: LayerBench) -> dict[str, Side]:
    """Return the sides of one problem, in the order in which they are timed."""
    problem = make(settings)
    names = [name for name in SIDES if name != "plain" or not settings.skip_plain]
    return {name: side(problem, SIDES[name], evaluate=settings.evaluate) for name in names}


def side(problem: LayerProblem, forward: Callable[[LayerProblem], Tensor], *, evaluate: bool) -> Side:
    """Return one side; in training each call finds changed parameters and no gradients, as after an optimizer step."""

    def run() -> None:
        if evaluate:
            with torch.no_grad():
                forward(problem)
        else:
            forward(problem).backward(problem.upstream)

    @torch.no_grad()
    def prepare() -> None:
        for leaf in () if evaluate else problem.leaves():
            leaf.grad = None
            leaf.mul_(1)  # a change, which empties caches of the layer

    return Side(run, prepare)


# -- measurements -----------------------------------------------------------------------------------------------------


def peak_extra_mb(settings: LayerBench, name: str) -> float:
    """Return the peak memory of one call of a side, in MB (10^6 bytes), beyond parameters, inputs and their gradients.

    With `evaluate` it is that of the first call, so that the layer's cache counts.
    """
    small = {
        key: min(SMALL, getattr(settings, key)) for key in ("batch", "length", "in_features", "out_features")
    }
    side(make(replace(settings, **small)), SIDES[name], evaluate=settings.evaluate).run()
    problem = make(settings)
    if not settings.evaluate:
        for leaf in problem.leaves():
            leaf.grad = torch.zeros_like(leaf)
    run = side(problem, SIDES[name], evaluate=settings.evaluate).run
    return extra_memory(run, device=settings.device) / MB


def bench_layer(settings: LayerBench) -> dict[str, Any]:
    """Return the figures: median seconds of each side, their ratios, peak extra memory in MB, all single times."""
    timed = ("merged",) if settings.skip_plain else ("merged", "plain")
    peaks = {name: in_child(peak_extra_mb, settings, name) for name in timed}
    times = alternate(sides(settings), repeats=settings.repeats, device=settings.device)
    median = medians(times)
    return {
        "dense_s": median["dense"],
        "plain_s": median.get("plain"),
        "merged_s": median["merged"],
        "ratio_plain": median["plain"] / median["merged"] if "plain" in median else None,
        "ratio_dense": median["merged"] / median["dense"],
        "peak_extra_mb_plain": peaks.get("plain"),
        "peak_extra_mb_merged": peaks["merged"],
        "times": times,
    }
