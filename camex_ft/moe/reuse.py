"""When results that are made of parameters are made once for several calls.

`ParameterCache`: forward passes without gradients within a scope in which parameters are declared unchanged, such as
an evaluation or one call of `generate` (`RoutingContext.cached`). Outside of a scope every pass makes them again, since
an edit through ``parameter.data`` leaves no trace.
`Step`: the micro-batches of an optimizer step. Transformed domain vectors T are made once; their gradients with respect
to T are summed, and the backward pass of the last one takes the sum back through multiplier and curvature, which are
linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from camex_ft.moe.vectors import Recipe, transform

Result = TypeVar("Result")


@dataclass(eq=False)
class Shared:
    """Transformed domain vectors that several calls use, and the gradient that they have gathered.

    Attributes:
        vectors: T; [N, out, in].
        seed: of the protocol's multiplier.
        grad: dT summed over the calls that went backward, or None.
        closed: the sum was taken back to experts, base and curvature.
    """

    vectors: Tensor
    seed: int = 0
    grad: Tensor | None = None
    closed: bool = False


class Snapshot:
    """Tensors at one moment, by identity, address and version counter.

    Their memory is held, so that no later tensor has the address of an earlier one. An edit through ``.data`` counts no
    version and is not seen; an inference tensor has no version.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = tuple(tensors)
        self._memory = [t.detach() for t in self._tensors]
        self._state = self._now()

    def of(self, tensors: Iterable[Tensor]) -> bool:
        """Return whether these are the same tensors, unchanged."""
        given = tuple(tensors)
        same = len(given) == len(self._tensors) and all(map(_is, given, self._tensors))
        return same and self.unchanged()

    def unchanged(self) -> bool:
        """Return whether no change was counted since."""
        return self._now() == self._state

    def _now(self) -> list[tuple[int, int, torch.dtype]]:
        return [(t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in self._tensors]


def _is(one: object, other: object) -> bool:
    return one is other


class ParameterCache:
    """Results of parameters that are declared unchanged; a change that counts versions is noticed all the same."""

    def __init__(self) -> None:
        self._entries: dict[object, tuple[Snapshot, Any]] = {}
        self._moments: dict[nn.Module, tuple[Snapshot, object]] = {}

    def get(self, owner: object, tensors: Iterable[Tensor], make: Callable[[], Result]) -> Result:
        """Return the owner's result, which is made of the tensors; made anew where one of them changed."""
        given = tuple(tensors)
        entry = self._entries.get(owner)
        if entry is None or not entry[0].of(given):
            entry = self._entries[owner] = Snapshot(given), make()
        result: Result = entry[1]
        return result

    def share(self, owner: object, recipe: Recipe) -> Shared:
        """Return T of a map in evaluation."""
        return self.get(owner, recipe.tensors(), lambda: Shared(transform(recipe)))

    def moment(self, module: nn.Module) -> object:
        """Return an object that stands for the values of a module's parameters now.

        A change drops everything: other modules' results may depend on these parameters.
        """
        found = self._moments.get(module)
        if found is not None and not found[0].unchanged():
            self.clear()
            found = None
        if found is None:
            found = self._moments[module] = Snapshot(module.parameters()), object()
        return found[1]

    def clear(self) -> None:
        """Drop all results."""
        self._entries.clear()
        self._moments.clear()


@dataclass(eq=False)
class Step:
    """The micro-batches of one optimizer step, and the domain vectors that their calls share, by map."""

    shared: dict[object, tuple[Snapshot, Shared]] = field(default_factory=dict)

    def share(self, owner: object, recipe: Recipe, seed: int, tensors: Iterable[Tensor]) -> Shared:
        """Return T of a map; the first micro-batch's recipe, and the seed of its multiplier, count for all.

        Args:
            owner: the map.
            recipe: what T is made of.
            seed: of the multiplier.
            tensors: those of the recipe that have to stay the same. A base expert that is carried is another tensor in
                every micro-batch, of the same values.

        Raises:
            RuntimeError: a parameter changed since the step's first micro-batch.
        """
        found = self.shared.get(owner)
        if found is None:
            with torch.no_grad():
                found = self.shared[owner] = Snapshot(tensors), Shared(transform(recipe), seed)
        elif not found[0].of(tensors):
            raise RuntimeError(
                "experts, base or curvature changed between the micro-batches of one optimizer step"
            )
        return found[1]

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
        every = [shared for _, shared in self.shared.values()]
        lost = sum(shared.grad is not None and not shared.closed for shared in every)
        for shared in every:
            shared.vectors, shared.grad = shared.vectors.new_empty(0), None
        self.shared.clear()
        return lost


class Micro(NamedTuple):
    """One micro-batch of an optimizer step: the step, and whether it is the last."""

    step: Step
    last: bool


class Accumulation:
    """The optimizer step that is under way."""

    def __init__(self) -> None:
        self._step: Step | None = None
        self.now: Micro | None = None

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Run one micro-batch, forward and backward; after the last, or one that failed, the step is over."""
        self._step = self._step or Step()
        self.now = Micro(self._step, last)
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
        """End the step, wherever it is."""
        if self._step is not None:
            self._step.give_up()
        self._step = self.now = None
