"""Merged products and their transformed domain vectors.

    T_i     = multiplier_i(tau) * M_i tau_i,   tau_i = E_i - E_m          [N, out, in]
    E_hat_g = E_m + alpha * sum_i s_gi T_i                                [G, out, in]

`MergedProduct` carries everything that defines E_hat beside the routing weights, from the layer to the forward and the
backward pass. Within a pass `DomainVectors` computes T and `DomainVectorsGradient` takes dT back to the experts, the
base and the curvature. A pointwise multiplier is applied to the rows of each slice of `merge_weights` while they are in
cache, so that T is never written or read for it. Other multipliers, and `mix_outputs`, which needs whole experts,
compute T as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from camex_ft.moe.curvature.base import Factors
from camex_ft.moe.workspace import workspace

# elements of one slice of all experts that a multiplier is applied to at once
SLICE_ELEMENTS = {"cpu": 3 << 17, "cuda": 1 << 28}

Form = Literal["merge", "mix"]
# tau [N, ...] -> multiplier of the same shape, constant for the gradient, or None for one everywhere
MultiplierFunction = Callable[..., "Tensor | None"]


@dataclass(frozen=True, eq=False)
class Multiplier:
    """A protocol's entrywise multiplier of domain vectors, which gives the same result at every call.

    Attributes:
        function: of tau, and of the keywords below that it takes.
        pointwise: an entry's multiplier depends on that entry of all experts alone, so that rows can be multiplied
            apart.
        random: the function takes a `generator`.
        takes_training: the function takes `training`.
        training: the layer is in training.
        seed: of the generator.
        statistic: the protocol's running statistic of each entry, passed as `statistic`; [N, ...], or None.
    """

    function: MultiplierFunction
    pointwise: bool = False
    random: bool = False
    takes_training: bool = False
    training: bool = False
    seed: int = 0
    statistic: Tensor | None = None

    def __call__(self, tau: Tensor, rows: slice = slice(None)) -> Tensor | None:
        """Return the multiplier of tau, which holds `rows` of the domain vectors."""
        arguments: dict[str, Any] = {"training": self.training} if self.takes_training else {}
        if self.random:
            arguments["generator"] = torch.Generator(device=tau.device).manual_seed(self.seed)
        if self.statistic is not None:
            arguments["statistic"] = self.statistic[:, rows]
        return self.function(tau, **arguments)


@dataclass(eq=False)
class CachedVectors:
    """Transformed domain vectors that several calls share, and the sum of their gradients.

    Attributes:
        vectors: T; [N, out, in].
        seed: of the protocol's multiplier.
        grad: dT summed over the calls whose backward pass ran, or None.
        closed: the sum was taken back to experts, base and curvature.
    """

    vectors: Tensor
    seed: int = 0
    grad: Tensor | None = None
    closed: bool = False


@dataclass(frozen=True, eq=False)
class MergedProduct:
    """The merged weight of one linear map, for any routing weights, and the way to compute the product with it.

    Attributes:
        experts: E_i; [N, out, in].
        base: E_m; [out, in]; None merges the experts themselves: E_hat = alpha * sum_i s_i E_i.
        alpha: merging step size.
        multiplier: the protocol's multiplier, or None for one everywhere.
        factors: of the curvature M, or None for the identity.
        sparse: zeros among the routing weights, of top-k routing, are constants: they have no gradient and cost no
            work.
        cached: T computed beforehand from the same tensors and multiplier, or None.
        last: the backward pass takes the gradient of cached T, summed over all calls that share it, back to experts,
            base and factors, which have no gradient through T before the last call.
        form: form of the product; None until `merged_linear` chooses the cheaper one.
        active: the experts that any group uses; None for all. `merged_linear` sets it, as the following two.
        once: the backward pass computes T while it takes dT back.
        with_mean: the mean of T over the experts is returned as well.
    """

    experts: Tensor
    base: Tensor | None
    alpha: float = 1.0
    multiplier: Multiplier | None = None
    factors: Factors | None = None
    sparse: bool = False
    cached: CachedVectors | None = None
    last: bool = True
    form: Form | None = None
    active: list[int] | None = None
    once: bool = False
    with_mean: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that T depends on; the base expert last."""
        statistic = None if self.multiplier is None else self.multiplier.statistic
        sources = (self.experts, statistic, *(self.factors or ()), self.base)
        return [tensor for tensor in sources if tensor is not None]

    @property
    def by_rows(self) -> bool:
        """Return whether rows of T follow from the same rows of experts and base."""
        pointwise = self.multiplier is None or self.multiplier.pointwise
        return self.base is None or (self.factors is None and pointwise)

    def with_tensors(self, experts: Tensor, base: Tensor | None, *factors: Tensor) -> MergedProduct:
        """Return the product with the same tensors as autograd saved them."""
        kind: Any = type(self.factors)
        curvature = None if self.factors is None else kind(*factors)
        return replace(self, experts=experts, base=base, factors=curvature)

    def tau(self, rows: slice = slice(None), *, out: Tensor | None = None) -> Tensor:
        """Return rows of the domain vectors; [N, rows, in]."""
        experts = self.experts[:, rows]
        return experts if self.base is None else torch.sub(experts, self.base[rows], out=out)

    def transform(self, active: Sequence[int] | None = None, *, out: Tensor | None = None) -> Tensor:
        """Return T; [N, out, in], in the experts' dtype, under autocast too.

        Args:
            active: the experts to compute; the others' entries are not set. None computes all.
            out: memory for the result.
        """
        if self.base is None:
            return self.experts
        with torch.autocast(device_type=self.experts.device.type, enabled=False):
            if self.factors is None:
                vectors = torch.sub(self.experts, self.base, out=out)
            else:
                vectors = self.factors.transform(self.experts, self.base, active, out=out)
            return self.multiply_(vectors)

    def multiply_(self, vectors: Tensor) -> Tensor:
        """Multiply [N, out, in] by the protocol's multiplier, in place."""
        if self.multiplier is None:
            return vectors
        for rows in slices(vectors) if self.multiplier.pointwise else (slice(None),):
            multiplier = self.multiplier(self.tau(rows), rows)
            if multiplier is not None:
                vectors[:, rows].mul_(multiplier)
        return vectors


class DomainVectors:
    """Transformed domain vectors in one forward or backward pass.

    Args:
        product: the product that they belong to.
        compute: compute what is needed as a whole now; else `pull_back` of their gradient leaves it here.

    Attributes:
        by_slices: the multiplier is applied to the rows of each slice.
        whole: T, or M_i tau_i where `by_slices`; None where rows are computed from experts and base.
    """

    def __init__(self, product: MergedProduct, *, compute: bool = True) -> None:
        multiplier = product.multiplier
        pointwise = product.base is None or multiplier is None or multiplier.pointwise
        self.product = product
        self.by_slices = product.cached is None and product.form == "merge" and pointwise
        self.whole = self._compute() if compute else None

    def _compute(self) -> Tensor | None:
        """Compute what is needed as a whole: T, or transformed domain vectors without multiplier, or nothing."""
        product, factors = self.product, self.product.factors
        if product.cached is not None:
            return product.cached.vectors
        if product.base is not None and (
            factors is not None or not (self.by_slices or product.multiplier is None)
        ):
            out = workspace("vectors", product.experts.shape, product.experts)
            if self.by_slices and factors is not None:
                return factors.transform(product.experts, product.base, product.active, out=out)
            return product.transform(product.active, out=out)
        return None

    def multiplier(self, rows: slice) -> Tensor | None:
        """Return the multiplier of the rows of a slice, valid until the next call; [N, rows, in], or None for one."""
        product, multiplier = self.product, self.product.multiplier
        if not self.by_slices or multiplier is None or product.base is None:
            return None
        count, out, width = product.experts.shape
        start, stop, _ = rows.indices(out)
        values = workspace("multiplier", (count, stop - start, width), product.experts)
        for part in slices(values):
            absolute = slice(start + part.start, start + part.stop)
            multiplied = multiplier(product.tau(absolute), absolute)
            if multiplied is None:
                return None
            values[:, part] = multiplied
        return values

    def rows(self, rows: slice, multiplier: Tensor | None) -> Tensor:
        """Return rows of T of the active experts, given the rows' multiplier; [N', rows, in]."""
        product, experts = self.product, self.product.experts
        vectors = experts if product.base is None else self.whole
        if vectors is None:
            shape = (len(experts), rows.stop - rows.start, experts.shape[-1])
            vectors = product.tau(rows, out=workspace("part", shape, experts))
            if multiplier is not None:
                vectors.mul_(multiplier)
        elif multiplier is None:
            vectors = vectors[:, rows]
        else:
            out = workspace("part", tuple(multiplier.shape), multiplier)
            vectors = torch.mul(vectors[:, rows], multiplier, out=out)
        return select(vectors, product.active)


class DomainVectorsGradient:
    """The gradient of T in one backward pass.

    Args:
        vectors: of the same pass.
        base: the gradient of E_m, from which sum_i dtau_i is subtracted; None where it is not needed.

    Attributes:
        grad: dT; [N, out, in], added up where several calls share T.
        shared: several calls share T.
    """

    def __init__(self, vectors: DomainVectors, base: Tensor | None) -> None:
        self.vectors, self.product = vectors, vectors.product
        self.base = None if self.product.base is None else base
        # rows that no curvature couples are taken back to tau at once
        self.direct = vectors.by_slices and self.product.factors is None
        cached, experts = self.product.cached, self.product.experts
        self.shared = cached is not None
        if cached is None:
            self.grad = torch.empty_like(experts)
            if self.product.active is not None:
                for i in set(range(len(experts))) - set(self.product.active):
                    self.grad[i] = 0
            return
        if cached.closed:
            raise RuntimeError(
                "a map with experts ran twice in the last micro-batch of an optimizer step: "
                "set merging.keep_vectors: false"
            )
        if cached.grad is None:
            cached.grad = torch.zeros_like(experts)
        self.grad = cached.grad

    def add_rows(self, rows: slice, part: Tensor, multiplier: Tensor | None) -> None:
        """Set or add rows of dT of the active experts, given the rows' multiplier; [N', rows, in]."""
        active = self.product.active
        if multiplier is not None:
            part.mul_(select(multiplier, active))
        if self.direct and self.base is not None:
            self.base[rows] -= part.sum(0)
        if active is not None:
            self.grad[:, rows].index_copy_(0, torch.tensor(active), part)
        elif self.shared:
            self.grad[:, rows] += part
        else:
            self.grad[:, rows] = part

    def add_mean(self, grad: Tensor | None) -> None:
        """Add the gradient of the mean of T, [out, in], which is that of every T_i times N; None is 0."""
        if grad is None:
            return
        self.grad += grad / len(self.grad)
        if self.direct and self.base is not None:
            self.base -= grad

    def pull_back(self, *, learn: bool, domain: bool, once: bool) -> tuple[Tensor | None, Factors | None]:
        """Return (dE, gradients of the factors) and subtract sum_i dtau_i from the base's gradient.

        Before the last call that shares T there are none.

        Args:
            learn: compute the factors' gradients.
            domain: compute dE or the base's gradient.
            once: leave T, or M_i tau_i where `by_slices`, in the domain vectors.
        """
        product, cached = self.product, self.product.cached
        if cached is not None:
            if not product.last:
                return None, None
            cached.closed, cached.grad = True, None
        if self.direct or product.base is None:
            return self.grad, None
        by_slices, dfactors = self.vectors.by_slices, None
        if not by_slices:
            product.multiply_(self.grad)
        if product.factors is not None:
            out = workspace("vectors", product.experts.shape, product.experts) if once else None
            dfactors = product.factors.transform_backward(
                self.grad, product.experts, product.base, product.active, learn=learn, domain=domain, out=out
            )
            if out is not None and not by_slices:
                product.multiply_(out)
            self.vectors.whole = out
        if self.base is not None:
            self.base.sub_(self.grad.sum(0))
        return self.grad, dfactors


def select(tensor: Tensor, active: list[int] | None, dim: int = 0) -> Tensor:
    """Return the active experts' part of a tensor."""
    return tensor if active is None else tensor.index_select(dim, torch.tensor(active))


def slices(experts: Tensor) -> Iterator[slice]:
    """Yield slices of rows such that a slice of all experts [N, rows, in] fits the budget."""
    count, out, width = experts.shape
    budget = SLICE_ELEMENTS.get(experts.device.type, SLICE_ELEMENTS["cpu"])
    rows = max(1, budget // (count * width))
    for start in range(0, out, rows):
        yield slice(start, min(start + rows, out))
