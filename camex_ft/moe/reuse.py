"""When transformed domain vectors T are made once for several calls.

In evaluation T is kept for as long as experts, base and curvature stay the same; `Reuse` notices changes made in place
and tensors that were exchanged, and forgets on every change between training and evaluation.
In training T is made once for the micro-batches of an optimizer step (a `Step`): their gradients with respect to T are
summed, and the backward pass of the last one takes the sum back through multiplier and curvature, which are linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from camex_ft.moe.vectors import Recipe, transform


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


@dataclass(eq=False)
class Step:
    """The micro-batches of one optimizer step, and what their calls share."""

    shared: list[Shared] = field(default_factory=list)

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
        lost = sum(shared.grad is not None and not shared.closed for shared in self.shared)
        for shared in self.shared:
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


class Reuse:
    """One map's transformed domain vectors, kept while they stay the same. A copied map starts without."""

    def __init__(self) -> None:
        self._shared: Shared | None = None
        self._state: tuple[object, ...] = ()
        self._step: Step | None = None

    def __deepcopy__(self, memo: object) -> Reuse:
        return Reuse()

    def __reduce__(self) -> tuple[type[Reuse], tuple[()]]:
        return Reuse, ()

    def forget(self) -> None:
        """Drop what is kept."""
        self._shared, self._state, self._step = None, (), None

    def kept(self, recipe: Recipe, carried: object = None) -> Shared | None:
        """Return T for evaluation, made anew if a parameter changed; None where changes could not be noticed.

        `carried` stands for the values of a base expert that is carried; None: it is a parameter.
        """
        state = _state(recipe, carried)
        if state is None:
            return None
        if self._shared is None or self._state != state or self._step is not None:
            self._set(Shared(transform(recipe)), state, None)
        return self._shared

    def within(self, step: Step, recipe: Recipe, seed: int, carried: object = None) -> Shared | None:
        """Return T for a micro-batch of `step`; the first one's recipe, and the seed of its multiplier, count for all.

        A base expert that is `carried` is another tensor in every micro-batch, of the same values.

        Raises:
            RuntimeError: a parameter changed since the step's first micro-batch.
        """
        state = _state(recipe, carried)
        if state is None:
            return None
        if self._shared is None or self._step is not step:
            with torch.no_grad():
                self._set(Shared(transform(recipe), seed), state, step)
            if self._shared is not None:
                step.shared.append(self._shared)
        elif self._state != state:
            raise RuntimeError(
                "experts, base or curvature changed between the micro-batches of one optimizer step"
            )
        return self._shared

    def _set(self, shared: Shared, state: tuple[object, ...], step: Step | None) -> None:
        self._shared, self._state, self._step = shared, state, step


def _state(recipe: Recipe, carried: object = None) -> tuple[object, ...] | None:
    """Return what changes when a parameter does, or None for tensors that do not count their changes.

    `carried` stands for the values of a base expert that is carried; None: it is a parameter.
    """
    own = recipe.base if carried is None else None
    statistic = None if recipe.keep is None else recipe.keep.statistic
    tensors = (recipe.experts, own, statistic, *(recipe.factors or ()))
    return versions((t for t in tensors if t is not None), carried)


def versions(tensors: Iterable[Tensor], carried: object = None) -> tuple[object, ...] | None:
    """Return what changes when one of the tensors or `carried` does, or None where that could not be noticed."""
    found = list(tensors)
    if any(t.is_inference() for t in found):
        return None
    return carried, *((t.data_ptr(), t._version, t.dtype) for t in found)
