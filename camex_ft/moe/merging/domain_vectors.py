"""Transformed domain vectors: T_i = keep_i(tau) * M_i tau_i with tau_i = E_i - E_m; [N, out, in].

`transform` makes them, `pull_back` takes their gradient back to experts, base and curvature. `source` says when less
than that is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from camex_ft.moe.curvature.base import Factors
from camex_ft.moe.workspace import workspace

# elements of one slice of all experts that is weighed at once
SLICE_ELEMENTS = {"cpu": 3 << 17, "cuda": 1 << 28}


# tau [N, ...] -> multiplier of the same shape, constant for the gradient, or None for one everywhere
Weigh = Callable[..., "Tensor | None"]


@dataclass(frozen=True)
class Keep:
    """A protocol's multiplier of domain vectors.

    Attributes:
        weigh: the function, which must give the same result at every call.
        pointwise: an entry's multiplier depends on that entry of all experts alone, so that rows can be weighed apart.
        statistic: what the protocol keeps for each entry and passes to the function as `statistic`; [N, ...], or None.
    """

    weigh: Weigh
    pointwise: bool = False
    statistic: Tensor | None = None

    @staticmethod
    def of(weigh: Weigh | None) -> Keep | None:
        """Return any multiplier as a `Keep`; of one that is none nothing is assumed."""
        return weigh if weigh is None or isinstance(weigh, Keep) else Keep(weigh)

    def __call__(self, tau: Tensor, rows: slice = slice(None)) -> Tensor | None:
        """Return the multiplier of tau, which is of some rows of the domain vectors."""
        if self.statistic is None:
            return self.weigh(tau)
        return self.weigh(tau, statistic=self.statistic[:, rows])


class Recipe(NamedTuple):
    """Tensors and multiplier that transformed domain vectors are computed from.

    Attributes:
        experts: E_i; [N, out, in].
        base: E_m; [out, in]; None takes the experts themselves for T.
        keep: the protocol's multiplier, or None.
        factors: of the curvature M, or None for the identity.
    """

    experts: Tensor
    base: Tensor | None
    keep: Keep | None
    factors: Factors | None

    def tensors(self, *, base: bool = True) -> list[Tensor]:
        """Return the tensors that T depends on, the base expert among them if asked for."""
        statistic = None if self.keep is None else self.keep.statistic
        given = (self.experts, self.base if base else None, statistic, *(self.factors or ()))
        return [tensor for tensor in given if tensor is not None]

    @property
    def keep_is_pointwise(self) -> bool:
        """Return whether rows can be multiplied apart."""
        return self.keep is not None and self.keep.pointwise

    @property
    def by_rows(self) -> bool:
        """Return whether rows of T follow from the same rows of experts and base."""
        return self.base is None or (self.factors is None and (self.keep is None or self.keep_is_pointwise))

    def tau(self, rows: slice = slice(None), *, out: Tensor | None = None) -> Tensor:
        """Return rows of the domain vectors; [N, rows, in]."""
        experts = self.experts[:, rows]
        return experts if self.base is None else torch.sub(experts, self.base[rows], out=out)

    def multiplier(self, rows: slice) -> Tensor | None:
        """Return a pointwise multiplier of some rows, in memory that the next call uses again; [N, rows, in]."""
        assert self.keep is not None
        count, out, width = self.experts.shape
        start, stop, _ = rows.indices(out)
        made = workspace("kept", (count, stop - start, width), self.experts)
        for part in slices(made):
            some = slice(start + part.start, start + part.stop)
            kept = self.keep(self.tau(some), some)
            if kept is None:
                return None
            made[:, part] = kept
        return made


def slices(experts: Tensor) -> Iterator[slice]:
    """Yield slices of rows such that a slice of all experts fits the budget."""
    count, out, width = experts.shape
    budget = SLICE_ELEMENTS.get(experts.device.type, SLICE_ELEMENTS["cpu"])
    rows = max(1, budget // (count * width))
    for start in range(0, out, rows):
        yield slice(start, min(start + rows, out))


def transform(recipe: Recipe, active: Sequence[int] | None = None, *, out: Tensor | None = None) -> Tensor:
    """Return T; [N, out, in], in the experts' dtype, under autocast too.

    Args:
        recipe: what it is made of.
        active: the experts to make it for; the others' entries are not set. None takes all.
        out: memory for the result.
    """
    if recipe.base is None:
        return recipe.experts
    with torch.autocast(device_type=recipe.experts.device.type, enabled=False):
        if recipe.factors is None:
            made = torch.sub(recipe.experts, recipe.base, out=out)
        else:
            made = recipe.factors.curve(recipe.experts, recipe.base, active, out=out)
        return _multiply(made, recipe)


def pull_back(
    grad: Tensor,
    recipe: Recipe,
    active: Sequence[int] | None = None,
    *,
    weighed: bool,
    learn: bool,
    domain: bool,
    out: Tensor | None = None,
) -> Factors | None:
    """Turn dT into dtau, in place, and return the gradients of the factors.

    Args:
        grad: dT, contiguous; [N, out, in].
        recipe, active: as `transform` had them.
        weighed: dT was multiplied by the multiplier already.
        learn: whether the factors' gradients are wanted.
        domain: whether dtau is wanted.
        out: memory for T, which curvature then makes on the way; where dT was `weighed`, without the multiplier.
    """
    if recipe.base is None:
        return None
    if not weighed:
        _multiply(grad, recipe)
    if recipe.factors is None:
        return None
    made = recipe.factors.curve_backward(
        grad, recipe.experts, recipe.base, active, learn=learn, domain=domain, out=out
    )
    if out is not None and not weighed:
        _multiply(out, recipe)
    return made


def _multiply(vectors: Tensor, recipe: Recipe) -> Tensor:
    """Multiply [N, out, in] by the protocol's multiplier, in place."""
    keep = recipe.keep
    if keep is None:
        return vectors
    if not keep.pointwise:
        kept = keep(recipe.tau())
        return vectors if kept is None else vectors.mul_(kept)
    for rows in slices(vectors):
        kept = keep(recipe.tau(rows), rows)
        if kept is not None:
            vectors[:, rows].mul_(kept)
    return vectors
