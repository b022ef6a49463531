"""Caches of results that depend on parameters alone, and of merged experts while tokens are generated.

`ParameterCache`: forward passes without gradients within a scope in which parameters are declared unchanged, such as
an evaluation or one call of `generate` (`RoutingContext.cached`). Outside of a scope every pass recomputes the results,
since an edit through ``parameter.data`` leaves no trace.
`OptimizerStep`: the micro-batches of an optimizer step. Transformed domain vectors T are computed once; the gradients
of T are summed, and the backward pass of the last micro-batch takes the sum back through multiplier and curvature,
which are linear.
`CachedExperts`: merged experts of a segment, used for each of its tokens. Rows with the same routing weights, such as
beams of one prompt or prompts in their first segment, share one. Different ones are stacked, [D, out, in], so that one
batched product serves all rows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from camex_ft.moe.merging.domain_vectors import CachedVectors, MergedProduct

Result = TypeVar("Result")


class Snapshot:
    """Tensors at one moment, by identity, address and version counter.

    Their memory is held, so that no later tensor has the address of an earlier one. An edit through ``.data`` counts no
    version and is not seen; an inference tensor has no version.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = tuple(tensors)
        self._memory = [t.detach() for t in self._tensors]
        self._versions = self._now()

    def matches(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these are the same tensors, unchanged."""
        same = len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors))
        return same and self.unchanged()

    def unchanged(self) -> bool:
        """Return whether no change was counted since."""
        return self._now() == self._versions

    def _now(self) -> list[tuple[int, int, torch.dtype]]:
        return [(t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in self._tensors]


class ParameterCache:
    """Results of parameters that are declared unchanged; a change that counts versions is noticed all the same."""

    def __init__(self) -> None:
        self._entries: dict[object, tuple[Snapshot, Any]] = {}
        self._moments: dict[nn.Module, tuple[Snapshot, object]] = {}

    def get(self, owner: object, tensors: Sequence[Tensor], compute: Callable[[], Result]) -> Result:
        """Return the owner's result, computed from the tensors; computed anew where one of them changed."""
        entry = self._entries.get(owner)
        if entry is None or not entry[0].matches(tensors):
            entry = self._entries[owner] = Snapshot(tensors), compute()
        result: Result = entry[1]
        return result

    def vectors(self, owner: object, product: MergedProduct) -> CachedVectors:
        """Return the cached T of a map in evaluation."""
        return self.get(owner, product.tensors, lambda: CachedVectors(product.transform()))

    def moment(self, module: nn.Module) -> object:
        """Return an object that stands for the present values of a module's parameters.

        A change drops everything: other modules' results may depend on these parameters.
        """
        entry = self._moments.get(module)
        if entry is not None and not entry[0].unchanged():
            self.clear()
            entry = None
        if entry is None:
            entry = self._moments[module] = Snapshot(module.parameters()), object()
        return entry[1]

    def clear(self) -> None:
        """Drop all results."""
        self._entries.clear()
        self._moments.clear()


@dataclass(eq=False)
class OptimizerStep:
    """The micro-batches of one optimizer step, and the domain vectors that they share, by map."""

    cached: dict[object, tuple[Snapshot, CachedVectors]] = field(default_factory=dict)

    def vectors(
        self, owner: object, product: MergedProduct, seed: int, tensors: Sequence[Tensor]
    ) -> CachedVectors:
        """Return the cached T of a map; the first micro-batch's product, and the seed of its multiplier, count for all.

        Args:
            owner: the map.
            product: of the map.
            seed: of the multiplier.
            tensors: those of the product that must stay the same. A propagated base expert is another tensor in every
                micro-batch, of the same values.

        Raises:
            RuntimeError: a parameter changed since the step's first micro-batch.
        """
        entry = self.cached.get(owner)
        if entry is None:
            with torch.no_grad():
                entry = self.cached[owner] = Snapshot(tensors), CachedVectors(product.transform(), seed)
        elif not entry[0].matches(tensors):
            raise RuntimeError(
                "experts, base or curvature changed between the micro-batches of one optimizer step"
            )
        return entry[1]

    def release(self) -> None:
        """Free the domain vectors.

        Raises:
            RuntimeError: a map took part in earlier micro-batches and not in the last: its gradient would be lost.
        """
        lost = self.give_up()
        if lost:
            raise RuntimeError(
                f"{lost} maps with experts took no part in the last micro-batch of an optimizer step, so that their "
                "gradients would be lost: set merging.keep_vectors: false"
            )

    def give_up(self) -> int:
        """Free the domain vectors, and return how many maps have gradients that were not taken further."""
        entries = [cached for _, cached in self.cached.values()]
        lost = sum(cached.grad is not None and not cached.closed for cached in entries)
        for cached in entries:
            cached.vectors, cached.grad = cached.vectors.new_empty(0), None
        self.cached.clear()
        return lost


class MicroBatch(NamedTuple):
    """One micro-batch of an optimizer step: the step, and whether it is the last."""

    step: OptimizerStep
    last: bool


class Accumulation:
    """The current optimizer step."""

    def __init__(self) -> None:
        self._step: OptimizerStep | None = None
        self.now: MicroBatch | None = None

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Run one micro-batch, forward and backward; after the last, or one that failed, the step is over."""
        self._step = self._step or OptimizerStep()
        self.now = MicroBatch(self._step, last)
        done = False
        try:
            yield
            done = True
        finally:
            self.now = None
            if last or not done:
                step, self._step = self._step, None
                if done:
                    step.release()
                else:
                    step.give_up()

    def give_up(self) -> None:
        """End the step early."""
        if self._step is not None:
            self._step.give_up()
        self._step = self.now = None


Key = tuple[float, ...]
Map = tuple[Tensor, Tensor | None]
# s [n, N] -> name of a map -> (E_hat [n, out, in], b_hat [n, out] or None)
Merge = Callable[[Tensor], dict[str, Map]]


@dataclass(frozen=True)
class CachedExperts:
    """Merged experts for D different rows of routing weights.

    Attributes:
        rows: which of the D serves each row; None where routing weights may have changed.
        keys: the routing weights of each; [D].
        maps: name of a map -> (E_hat [D, out, in], b_hat [D, out] or None); empty where there are none.
        dtype: of the maps.
        moment: stands for the values of the parameters that they depend on (`ParameterCache.moment`).
    """

    rows: tuple[int, ...] | None
    keys: tuple[Key, ...]
    maps: Mapping[str, Map]
    dtype: torch.dtype
    moment: object = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Pickle nothing: cached experts do not outlive the scope in which parameters are declared unchanged."""
        return type(None), ()

    def stale(self) -> CachedExperts:
        """Return the same for rows whose routing weights may have changed."""
        return replace(self, rows=None)

    def select(self, rows: Sequence[int]) -> CachedExperts:
        """Return the same for some of the rows."""
        return self if self.rows is None else replace(self, rows=tuple(self.rows[i] for i in rows))

    def apply(self, name: str, x: Tensor) -> Tensor:
        """Return x E_hat^T + b_hat, each row with its own, in the maps' dtype; [B, L, in] -> [B, L, out]."""
        assert self.rows is not None
        weight, bias = self.maps[name]
        x = x.to(weight.dtype)
        count = len(self.keys)
        if count == 1:
            return F.linear(x, weight[0], None if bias is None else bias[0])
        order = sorted(range(len(self.rows)), key=self.rows.__getitem__)
        sizes = [self.rows.count(i) for i in range(count)]
        rows = x if order == list(range(len(order))) else x[order]
        if len(set(sizes)) == 1:
            y = _products(rows.reshape(count, -1, x.shape[2]), weight, bias).reshape(*x.shape[:2], -1)
        else:
            parts = zip(rows.split(sizes), range(count), strict=True)
            y = torch.cat([F.linear(part, weight[i], None if bias is None else bias[i]) for part, i in parts])
        return y if rows is x else y[torch.tensor(order).argsort().to(x.device)]


def _products(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x_i E_hat_i^T + b_hat_i; [D, m, in], [D, out, in], [D, out] -> [D, m, out]."""
    columns = x.transpose(1, 2)  # for few rows the weights are best read as they lie, see docs/cost.md
    y = torch.bmm(weight, columns) if bias is None else torch.baddbmm(bias.unsqueeze(2), weight, columns)
    return y.transpose(1, 2)


def merge_cached(
    weights: Tensor,
    before: CachedExperts | None,
    merge: Merge,
    *,
    most: int,
    dtype: torch.dtype,
    moment: object = None,
) -> CachedExperts:
    """Return merged experts for rows with these routing weights.

    Args:
        weights: s; [B, N].
        before: the experts cached until now, which are reused.
        merge: merges experts.
        most: where more rows than these differ, none is merged and `maps` is empty: the memory would grow with the
            batch.
        dtype: of the maps.
        moment: stands for the values of the parameters that `merge` uses.
    """
    rows = [tuple(row) for row in weights.tolist()]
    keys = tuple(dict.fromkeys(rows))
    known: list[Key] = []
    if len(keys) <= most:
        if before is not None and before.maps and before.dtype == dtype and before.moment is moment:
            known = [key for key in before.keys if key in keys]
        new = [key for key in keys if key not in known]
        keys = (*known, *new)
        maps = merge(weights[[rows.index(key) for key in new]]) if new else {}
        if known and before is not None:
            chosen = torch.tensor([before.keys.index(key) for key in known], device=weights.device)
            maps = {name: _stack(pair, maps.get(name), chosen) for name, pair in before.maps.items()}
    else:
        maps = {}
    place = {key: i for i, key in enumerate(keys)}
    return CachedExperts(tuple(place[row] for row in rows), keys, maps, dtype, moment)


def _stack(old: Map, new: Map | None, chosen: Tensor) -> Map:
    """Return some of the old ones with the new ones behind them."""
    if new is None and len(chosen) == len(old[0]) and chosen.tolist() == list(range(len(chosen))):
        return old
    weight, bias = old[0][chosen], None if old[1] is None else old[1][chosen]
    if new is None:
        return weight, bias
    return torch.cat([weight, new[0]]), None if bias is None or new[1] is None else torch.cat([bias, new[1]])
