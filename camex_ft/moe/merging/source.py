"""Transformed domain vectors as one call of the merged map sees them: where T comes from, and where dT goes.

A pointwise multiplier is applied to the rows that a slice of `merge` asks for, while they are in cache, and kept for
the gradient of the same rows; so T is never read or written for it. Other multipliers, and the form `mix`, which needs
whole experts, have T made in whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from camex_ft.moe.curvature.base import Factors
from camex_ft.moe.merging.caching import Shared
from camex_ft.moe.merging.cost_model import Form
from camex_ft.moe.merging.domain_vectors import Keep, Recipe, pull_back, transform
from camex_ft.moe.workspace import workspace


@dataclass(frozen=True, kw_only=True)
class Call:
    """Settings of one call, beside its tensors.

    Attributes:
        alpha, keep, sparse, shared, last: as `merged_linear` was given them.
        form: of the product.
        active: the experts that any group uses; None for all.
        once: the backward pass makes T while it takes dT back.
        kind: of the curvature's factors; None without.
        mean: the mean of T over the experts is wanted as well.
    """

    alpha: float
    keep: Keep | None
    sparse: bool
    shared: Shared | None
    last: bool
    form: Form
    active: list[int] | None
    once: bool
    kind: type[Factors] | None
    mean: bool = False

    def factors(self, tensors: Sequence[Tensor]) -> Factors | None:
        """Return the tensors that went through autograd as the factors that they were."""
        return None if self.kind is None else self.kind.of(tensors)

    def idle(self, experts: int) -> list[int]:
        """Return the experts that no group uses."""
        return [] if self.active is None else sorted(set(range(experts)) - set(self.active))


class Source:
    """Source of T in one forward or backward pass.

    Attributes:
        sliced: the multiplier is applied to the rows of a slice.
        whole: T, or curved domain vectors where `sliced`; None where rows are made of experts and base.
    """

    def __init__(self, recipe: Recipe, call: Call) -> None:
        self.recipe, self.call = recipe, call
        plain = recipe.base is None or recipe.keep is None
        self.sliced = call.shared is None and call.form == "merge" and (plain or recipe.keep_is_pointwise)
        self.whole: Tensor | None = None
        self._kept: tuple[slice, Tensor | None] | None = None

    def make(self) -> Source:
        """Make what has to be made in whole: T, or curved domain vectors, or nothing."""
        recipe, call = self.recipe, self.call
        memory = (recipe.experts.shape, recipe.experts)
        if call.shared is not None:
            self.whole = call.shared.vectors
        elif recipe.base is None or (recipe.factors is None and (self.sliced or recipe.keep is None)):
            self.whole = None
        elif self.sliced and recipe.factors is not None:
            out = workspace("vectors", *memory)
            self.whole = recipe.factors.curve(recipe.experts, recipe.base, call.active, out=out)
        else:
            self.whole = transform(recipe, call.active, out=workspace("vectors", *memory))
        return self

    def part(self, rows: slice) -> Tensor:
        """Return rows of T of the active experts; [N', rows, in]."""
        recipe, experts = self.recipe, self.recipe.experts
        given = experts if recipe.base is None else self.whole
        kept = self.multiplier(rows) if self.sliced else None
        if given is None:
            made = workspace("part", (len(experts), rows.stop - rows.start, experts.shape[-1]), experts)
            given = recipe.tau(rows, out=made)
            if kept is not None:
                given.mul_(kept)
        elif kept is None:
            given = given[:, rows]
        else:
            given = torch.mul(given[:, rows], kept, out=workspace("part", tuple(kept.shape), kept))
        return select(given, self.call.active)

    def vector(self, i: int | slice) -> Tensor:
        """Return T_i [out, in], or all of T."""
        if self.whole is not None:
            return self.whole[i]
        experts, base = self.recipe.experts[i], self.recipe.base
        if base is None:
            return experts
        return torch.sub(experts, base, out=workspace("vector", tuple(experts.shape), experts))

    def mean(self) -> Tensor:
        """Return 1/N sum_i T_i; [out, in]."""
        recipe = self.recipe
        assert recipe.keep is None, "the mean is that of domain vectors without a multiplier"
        if self.whole is not None:
            return self.whole.mean(0)
        mean = recipe.experts.mean(0)
        return mean if recipe.base is None else mean.sub_(recipe.base)

    def multiplier(self, rows: slice) -> Tensor | None:
        """Return the multiplier of some rows of all experts; [N, rows, in]."""
        if self.recipe.keep is None or self.recipe.base is None:
            return None
        if self._kept is None or self._kept[0] != rows:
            self._kept = rows, self.recipe.multiplier(rows)
        return self._kept[1]


class Gathered:
    """The gradient of T, as the backward pass of a product hands it over, and its way back to the parameters.

    Args:
        source: of the same pass.
        base: the gradient of E_m, which sum_i dtau_i is subtracted from; None where it is not wanted.
    """

    def __init__(self, source: Source, base: Tensor | None) -> None:
        self.source, self.recipe, self.call, self.base = source, source.recipe, source.call, base
        shared, experts = self.call.shared, self.recipe.experts
        # rows that no curvature couples are taken back to tau at once
        self.direct = source.sliced and self.recipe.factors is None
        if shared is None:
            self.grad = torch.empty_like(experts)
            for i in self.call.idle(len(experts)):
                self.grad[i] = 0
            return
        if shared.closed:
            raise RuntimeError(
                "a map with experts ran twice in the last micro-batch of an optimizer step: "
                "set merging.keep_vectors: false"
            )
        if shared.grad is None:
            shared.grad = torch.zeros_like(experts)
        self.grad = shared.grad

    def rows(self, rows: slice, part: Tensor) -> None:
        """Take rows of dT of the active experts; [N', rows, in]."""
        active = self.call.active
        kept = self.source.multiplier(rows) if self.source.sliced else None
        if kept is not None:
            part.mul_(select(kept, active))
        if self.direct and self.base is not None and self.recipe.base is not None:
            self.base[rows] -= part.sum(0)
        if active is not None:
            self.grad[:, rows].index_copy_(0, torch.tensor(active), part)
        elif self.call.shared is not None:
            self.grad[:, rows] += part
        else:
            self.grad[:, rows] = part

    def product(self, i: int, left: Tensor, right: Tensor) -> None:
        """Take dT_i = left right; [out, m], [m, in]."""
        if left.dtype != self.grad.dtype:
            product = left @ right
            self.grad[i] = self.grad[i] + product if self.call.shared is not None else product
        elif self.call.shared is not None:
            self.grad[i].addmm_(left, right)
        else:
            torch.mm(left, right, out=self.grad[i])

    def all(self, grad: Tensor) -> None:
        """Take dT; [N, out, in]."""
        if self.call.shared is not None:
            self.grad += grad
        else:
            self.grad.copy_(grad)

    def mean(self, grad: Tensor | None) -> None:
        """Take the gradient of the mean of T, [out, in], which is that of every T_i times N; None is 0."""
        if grad is None:
            return
        self.grad += grad / len(self.grad)
        if self.direct and self.base is not None and self.recipe.base is not None:
            self.base -= grad

    def back(self, *, learn: bool, domain: bool, once: bool) -> tuple[Tensor | None, Factors | None]:
        """Return (dE, d factors) and subtract sum_i dtau_i from the gradient of the base; nothing before the last.

        Args:
            learn: whether the factors' gradients are wanted.
            domain: whether dE or that of the base is wanted.
            once: leave T, or curved domain vectors, in the source.
        """
        shared, recipe, experts = self.call.shared, self.recipe, self.recipe.experts
        if shared is not None:
            if not self.call.last:
                return None, None
            shared.closed, shared.grad = True, None
        if self.direct or recipe.base is None:
            return self.grad, None
        out = workspace("vectors", experts.shape, experts) if once else None
        weighed = self.source.sliced
        factors = pull_back(
            self.grad, recipe, self.call.active, weighed=weighed, learn=learn, domain=domain, out=out
        )
        self.source.whole = out
        if self.base is not None:
            self.base.sub_(self.grad.sum(0))
        return self.grad, factors


def select(tensor: Tensor, active: list[int] | None, dim: int = 0) -> Tensor:
    """Return the active experts' part of a tensor."""
    return tensor if active is None else tensor.index_select(dim, torch.tensor(active))
