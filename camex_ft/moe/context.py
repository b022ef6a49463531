"""The forward pass as the model and its expert layers share it.

The model's forward pre-hook reads the masks out of the call's arguments and opens a `Pass`; every expert layer finds
its mask there and leaves its routing there; the forward hook closes it. A context belongs to one model, and the open
pass to one thread: two models, or two threads with one model, never meet.

Gradient checkpointing runs a block again during the backward pass, perhaps in another thread and after a later forward
pass. What it runs again is therefore wrapped, so that it keeps the masks of its own pass.
"""

from __future__ import annotations

import hashlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from camex_ft.moe.merging.base_expert import Bases
from camex_ft.moe.merging.caching import Accumulation, Micro, ParameterCache
from camex_ft.moe.merging.reference import traced
from camex_ft.moe.routing.cache import LayerState, RoutingState
from camex_ft.moe.routing.grouping import Layout
from camex_ft.moe.routing.losses import Balance
from camex_ft.moe.routing.router import masked_mean

Total = Callable[[Tensor], Tensor]
ReadPass = Callable[["RoutingContext", nn.Module, Mapping[str, Any]], "Pass"]
WriteState = Callable[["Pass", Any, RoutingState], None]


class LayerRouting(NamedTuple):
    """Routing of one expert layer in one pass.

    Attributes:
        weights: routing weights s of its groups, detached; [B, N], [B, S, N] or [B, L, N].
        mask: 1 for groups that hold a token; [B], [B, S] or [B, L]; None where all do.
        sums: what its balance loss and its z-loss are made of; None where it has none.
    """

    weights: Tensor
    mask: Tensor | None = None
    sums: Balance | None = None

    @property
    def balance(self) -> Tensor:
        """Its balance loss, and its z-loss with it, over the groups of this process; a scalar, with its graph."""
        return self.weights.new_zeros(()) if self.sums is None else self.sums.loss()


@dataclass
class Pass:
    """One forward pass.

    Attributes:
        masks: goes in: mask [B, L] by stack, 1 for tokens that count; None where all do.
        documents: goes in: packed documents, numbered within each row; [B, L], or [1, L] for all rows; None without.
        cached: goes in: how many earlier positions a key-value cache stands for.
        cache: goes in: the key-value cache itself, whatever it is.
        caching: goes in: whether there may be a later pass that goes on from this one.
        state: goes in: what routing remembers with the cache.
        encoded: goes in, or comes from the encoder on the way: its output, pooled over the tokens that count; [B, d].
        micro: goes in: which micro-batch of an optimizer step this is, where it has several.
        parameter_cache: goes in: results of parameters that are declared unchanged, or None.
        seed: goes in: what random multipliers of domain vectors are drawn from; None: the process's generator.
        carried: made on the way: base experts by layer name and map, of dynamic merging.
        grams, bargains: made on the way: Gram matrices of domain vectors and Nash weights by layer name.
        layers: comes out: routing by layer name.
        remembered: comes out: what each layer remembers from now on.
    """

    masks: Mapping[str, Tensor | None] = field(default_factory=dict)
    documents: Tensor | None = None
    cached: int = 0
    cache: Any = None
    caching: bool = False
    state: RoutingState | None = None
    encoded: Tensor | None = None
    micro: Micro | None = None
    parameter_cache: ParameterCache | None = None
    seed: int | None = None
    carried: dict[str, Mapping[str, Bases]] = field(default_factory=dict)
    grams: dict[str, Tensor] = field(default_factory=dict)
    bargains: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, LayerRouting] = field(default_factory=dict)
    remembered: dict[str, LayerState] = field(default_factory=dict)
    _layouts: dict[str, Layout] = field(default_factory=dict)

    def layout(self, stack: str, hidden: Tensor) -> Layout:
        """Return where the tokens of a stack's hidden states [B, L, d] stand; the same for all of its layers.

        Raises:
            ValueError: the mask has fewer positions than there are tokens.
        """
        known = self._layouts.get(stack)
        if known is None:
            known = self._layouts[stack] = self._lay_out(stack, hidden)
        return known

    def _lay_out(self, stack: str, hidden: Tensor) -> Layout:
        mask, (batch, length) = self.masks.get(stack), hidden.shape[:2]
        if mask is not None and mask.shape[1] < length:
            raise ValueError(f"the mask of the {stack} has {mask.shape[1]} positions for {length} tokens")
        if stack != "decoder":
            return Layout.of((batch, length), None if mask is None else mask[:, -length:])
        chunk = mask
        if mask is not None:  # of all positions of the cache, of those up to here, or of the new ones alone
            start = min(self.cached, mask.shape[1] - length)
            chunk = mask[:, start : start + length]
        documents = None if self.documents is None else self.documents.expand(batch, -1)
        return Layout.of((batch, length), chunk, state=self.state, keep=self.caching, documents=documents)

    def seed_of(self, name: str) -> int | None:
        """Return the seed of one map of the model, other than that of any other map; None where there is none."""
        if self.seed is None:
            return None
        return (
            int.from_bytes(hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=7).digest(), "big") + 1
        )

    def balance_loss(self, total: Total | None = None) -> Tensor | None:
        """Return the sum of the layers' balance losses, a scalar, or None where no layer ran.

        Args:
            total: adds up a vector over all processes, with its gradient: then the losses are of the global batch.
        """
        if not self.layers:
            return None
        sums = [layer.sums for layer in self.layers.values() if layer.sums is not None]
        if sums and total is not None:
            device = sums[0].importance.device  # a model may lie on several
            flat = [one.flat().to(device) for one in sums]
            parts = total(torch.cat(flat)).split([len(part) for part in flat])
            sums = [one.of(part) for one, part in zip(sums, parts, strict=True)]
        first = next(iter(self.layers.values()))
        losses = [one.loss() for one in sums]
        return torch.stack(losses).sum() if losses else first.balance


class _Local(threading.local):
    def __init__(self) -> None:
        self.stack: list[Pass] = []
        self.entered: list[nn.Module] = []
        self.last: Pass | None = None
        self.accumulation = Accumulation()
        self.parameter_cache: ParameterCache | None = None
        self.seed: int | None = None


class RoutingContext:
    """Carries one model's passes.

    Args:
        read: (context, module, arguments of its call) -> the pass.
        write: (pass, output of the module, what routing remembers from now on) -> None; puts the last beside the
            key-value cache, which is among the arguments or in the output.
    """

    def __init__(self, read: ReadPass, write: WriteState | None = None) -> None:
        self.read, self.write = read, write
        self._local = _Local()

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingContext:
        """A copied model starts with a context of its own, without passes."""
        memo[id(self)] = copy = RoutingContext(self.read, self.write)
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        return RoutingContext, (self.read, self.write)

    @property
    def active(self) -> Pass | None:
        """The pass that this thread is in, or None."""
        return self._local.stack[-1] if self._local.stack else None

    @property
    def last(self) -> Pass | None:
        """The pass that this thread finished last, or None."""
        return self._local.last

    @property
    def parameter_cache(self) -> ParameterCache | None:
        """The cache of the `cached` block that this thread is in, or None."""
        return self._local.parameter_cache

    def forget(self) -> None:
        """Forget all passes, which an error may have ended, with what they hold for a backward pass."""
        self._local.accumulation.give_up()
        self._local = _Local()

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Run one of an optimizer step's micro-batches, forward and backward, in a ``with`` block.

        Transformed domain vectors are made in the first one and used in all; those of experts, base and curvature that
        they come from have their gradients after the `last` one.
        """
        return self._local.accumulation.micro_batch(last=last)

    @contextmanager
    def cached(self) -> Iterator[None]:
        """Declare the model's parameters unchanged in the passes of a ``with`` block, within this thread.

        What evaluation makes of them alone (transformed domain vectors, base experts that are carried, merged experts
        of a segment) is then made once. A block within a block shares its cache; the outermost one drops it.
        """
        local = self._local
        if local.parameter_cache is not None:
            yield
            return
        local.parameter_cache = made = ParameterCache()
        try:
            yield
        finally:
            local.parameter_cache = None
            made.clear()

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Draw random multipliers from `seed` in the passes of a ``with`` block, alike in every process."""
        self._local.seed = seed
        try:
            yield
        finally:
            self._local.seed = None

    def attach(self, module: nn.Module) -> None:
        """Open a pass whenever `module` is called; inside another pass of the same model this does nothing."""
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after, always_call=True)

    def attach_encoder(self, module: nn.Module) -> None:
        """Keep the pooled output of `module`, the encoder, for decoder layers that are routed by it."""
        module.register_forward_hook(self._encoded)

    @contextmanager
    def open(self, current: Pass) -> Iterator[Pass]:
        """Open a pass for the time of a ``with`` block; it does not become `last`."""
        self._local.stack.append(current)
        try:
            yield current
        finally:
            self._local.stack.pop()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered = self._local.entered
        if any(module is other for other in entered):
            entered.clear()  # Ctrl-C, unlike an `Exception`, ended a pass without its forward hooks
            self._local.stack.clear()
        entered.append(module)
        if len(entered) == 1:
            self._local.stack.append(Pass())  # for `_after`, which also runs where reading fails
            arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            arguments.update(arguments.pop("kwargs", {}))
            self._local.stack[-1] = self.read(self, module, arguments)
            if not traced():  # which follows each pass by itself
                self._local.stack[-1].micro = self._local.accumulation.now
                self._local.stack[-1].parameter_cache = self._local.parameter_cache
            self._local.stack[-1].seed = self._local.seed
            if module.training:
                self._wrap_checkpointing(module)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._local.entered.pop()
        if self._local.entered:
            return
        ended = self._local.last = self._local.stack.pop()
        try:
            if output is not None and ended.remembered and self.write is not None:
                self.write(ended, output, self._state(ended))
        finally:  # what runs again in the backward pass needs masks and encoder output, and nobody the cache
            ended.cache = ended.state = None
            ended.remembered, ended._layouts = {}, {}

    def _state(self, ended: Pass) -> RoutingState:
        layout, (first, *_) = ended._layouts["decoder"], ended.remembered.values()
        state = ended.state or RoutingState(self)
        state.advance(layout.flags(first.weights.device), layout.after, ended.remembered)
        return state

    def _encoded(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.active is not None:
            self.active.encoded = masked_mean(output[0], self.active.masks.get("encoder"))

    def _wrap_checkpointing(self, model: nn.Module) -> None:
        for module in model.modules():
            function: Any = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None and getattr(function, "func", None) != self._checkpoint:
                wrapped: Any = partial(self._checkpoint, function)
                module._gradient_checkpointing_func = wrapped

    def _checkpoint(self, checkpoint: Callable[..., Any], run: Callable[..., Any], *args: Any) -> Any:
        outer = self.active
        if outer is None:
            return checkpoint(run, *args)
        grad = torch.is_grad_enabled()

        def run_in_pass(*inputs: Any) -> Any:
            if self.active is outer:
                if grad and not torch.is_grad_enabled():
                    raise RuntimeError(
                        "reentrant gradient checkpointing would lose the balance loss: pass "
                        "activation_checkpointing_kwargs={'use_reentrant': False}"
                    )
                return run(*inputs)
            with self.open(replace(outer, layers={}, remembered={})):
                return run(*inputs)

        return checkpoint(run_in_pass, *args)
