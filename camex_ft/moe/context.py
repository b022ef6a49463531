"""Context of a model's forward passes, shared by the model and its expert layers.

The model's forward pre-hook reads the masks from the call's arguments and opens a `ForwardState`; every expert layer
finds its mask there and leaves its routing there; the forward hook closes it. A context belongs to one model, and the
open forward state to one thread: two models, or two threads with one model, never share any.

Gradient checkpointing runs a block again during the backward pass, perhaps in another thread and after a later forward
pass. The block is therefore wrapped, so that it runs with the masks of its own forward pass.
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

from camex_ft.moe.merging.base_expert import BaseExperts
from camex_ft.moe.merging.caching import Accumulation, MicroBatch, ParameterCache
from camex_ft.moe.merging.functional import traced
from camex_ft.moe.routing.losses import LossSums
from camex_ft.moe.routing.router import TokenPositions, masked_mean
from camex_ft.moe.routing.router_state import LayerRouterState, RouterState

Total = Callable[[Tensor], Tensor]
ReadCall = Callable[["RoutingContext", nn.Module, Mapping[str, Any]], "ForwardState"]
WriteRouterState = Callable[["ForwardState", Any, RouterState], None]


class LayerRouting(NamedTuple):
    """Routing of one expert layer in one forward pass.

    Attributes:
        weights: routing weights s of its groups, detached; [B, N], [B, S, N] or [B, L, N].
        mask: 1 for groups that hold a token; [B], [B, S] or [B, L]; None where all do.
        sum_losses: computes the sums that its balance loss and its z-loss depend on; None where it has none.
    """

    weights: Tensor
    mask: Tensor | None = None
    sum_losses: Callable[[], LossSums] | None = None

    @property
    def balance(self) -> Tensor:
        """Its balance loss and z-loss over the groups of this process; a scalar, with its graph."""
        return self.weights.new_zeros(()) if self.sum_losses is None else self.sum_losses().loss()


@dataclass
class ForwardState:
    """State of one forward pass.

    Attributes:
        masks: input: mask [B, L] by stack, 1 for tokens that count; None where all do.
        documents: input: packed documents, numbered within each row; [B, L], or [1, L] for all rows; None without.
        cached: input: the number of earlier positions in a key-value cache.
        kv_cache: input: the key-value cache.
        resumable: input: a later forward pass may go on from this one.
        router_state: input: router state beside the key-value cache.
        encoded: input, or set by the encoder: its output, pooled over the tokens that count; [B, d].
        micro_batch: input: the micro-batch of an optimizer step that has several.
        parameter_cache: input: cached results of parameters that are declared unchanged, or None.
        seed: input: seed of random multipliers of domain vectors; None: the process's generator.
        base_experts: intermediate: base experts by layer name and map, in dynamic merging.
        grams, nash_weights: intermediate: Gram matrices of domain vectors and Nash weights by layer name.
        layers: output: routing by layer name.
        new_router_states: output: router state by layer name, after this forward pass.
    """

    masks: Mapping[str, Tensor | None] = field(default_factory=dict)
    documents: Tensor | None = None
    cached: int = 0
    kv_cache: Any = None
    resumable: bool = False
    router_state: RouterState | None = None
    encoded: Tensor | None = None
    micro_batch: MicroBatch | None = None
    parameter_cache: ParameterCache | None = None
    seed: int | None = None
    base_experts: dict[str, Mapping[str, BaseExperts]] = field(default_factory=dict)
    grams: dict[str, Tensor] = field(default_factory=dict)
    nash_weights: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, LayerRouting] = field(default_factory=dict)
    new_router_states: dict[str, LayerRouterState] = field(default_factory=dict)
    _positions: dict[str, TokenPositions] = field(default_factory=dict)

    def positions(self, stack: str, hidden: Tensor) -> TokenPositions:
        """Return the positions of a stack's hidden states [B, L, d]; the same for all of its layers.

        Raises:
            ValueError: the mask has fewer positions than there are tokens.
        """
        if stack in self._positions:
            return self._positions[stack]
        mask, (batch, length) = self.masks.get(stack), hidden.shape[:2]
        if mask is not None and mask.shape[1] < length:
            raise ValueError(f"the mask of the {stack} has {mask.shape[1]} positions for {length} tokens")
        if stack != "decoder":
            positions = TokenPositions((batch, length), None if mask is None else mask[:, -length:])
        else:
            if (
                mask is not None
            ):  # of all positions of the cache, of those up to here, or of the new ones alone
                start = min(self.cached, mask.shape[1] - length)
                mask = mask[:, start : start + length]
            positions = TokenPositions.of(
                (batch, length),
                mask,
                before=() if self.router_state is None else self.router_state.counts,
                resumable=self.resumable,
                documents=None if self.documents is None else self.documents.expand(batch, -1),
            )
        self._positions[stack] = positions
        return positions

    def seed_of(self, name: str) -> int | None:
        """Return the seed of one map of the model, other than that of any other map; None without a seed."""
        if self.seed is None:
            return None
        digest = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big") + 1

    def balance_loss(self, total: Total | None = None) -> Tensor | None:
        """Return the sum of the layers' balance losses, a scalar, or None where no layer ran.

        Args:
            total: adds up a vector over all processes, with its gradient: then the losses are of the global batch.
        """
        if not self.layers:
            return None
        sums = [layer.sum_losses() for layer in self.layers.values() if layer.sum_losses is not None]
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
        self.stack: list[ForwardState] = []
        self.entered: list[nn.Module] = []
        self.last: ForwardState | None = None
        self.accumulation = Accumulation()
        self.parameter_cache: ParameterCache | None = None
        self.seed: int | None = None


class RoutingContext:
    """Context of one model's forward passes.

    Args:
        read: (context, module, arguments of its call) -> the forward state.
        write: (forward state, output of the module, router state) -> None; puts the router state beside the key-value
            cache, which is among the arguments or in the output.
    """

    def __init__(self, read: ReadCall, write: WriteRouterState | None = None) -> None:
        self.read, self.write = read, write
        self._local = _Local()

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingContext:
        """Give a copied model a context of its own, without forward passes."""
        memo[id(self)] = copy = RoutingContext(self.read, self.write)
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        return RoutingContext, (self.read, self.write)

    @property
    def active(self) -> ForwardState | None:
        """The forward state that this thread is in, or None."""
        return self._local.stack[-1] if self._local.stack else None

    def locate(self, stack: str, hidden: Tensor) -> tuple[ForwardState, TokenPositions]:
        """Return the forward state, an empty one outside of all forward passes, and the positions of a stack's tokens.

        Args:
            stack: key of the stack's mask.
            hidden: hidden states; [B, L, d].
        """
        state = self._local.stack[-1] if self._local.stack else ForwardState()
        return state, state.positions(stack, hidden)

    @property
    def last(self) -> ForwardState | None:
        """The forward state that this thread finished last, or None."""
        return self._local.last

    @property
    def parameter_cache(self) -> ParameterCache | None:
        """The cache of the `cached` block that this thread is in, or None."""
        return self._local.parameter_cache

    def forget(self) -> None:
        """Drop all forward states, which an error may have ended, with the tensors that they hold for a backward
        pass."""
        self._local.accumulation.give_up()
        self._local = _Local()

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Run one of an optimizer step's micro-batches, forward and backward, in a ``with`` block.

        Transformed domain vectors are computed in the first one and used in all; experts, base and curvature have their
        gradients through them after the `last` one.
        """
        return self._local.accumulation.micro_batch(last=last)

    @contextmanager
    def cached(self) -> Iterator[None]:
        """Declare the model's parameters unchanged in the forward passes of a ``with`` block, within this thread.

        Results of evaluation that depend on them alone (transformed domain vectors, propagated base experts, merged
        experts of a segment) are then computed once. A block within a block shares its cache; the outermost one drops
        it.
        """
        local = self._local
        if local.parameter_cache is not None:
            yield
            return
        local.parameter_cache = cache = ParameterCache()
        try:
            yield
        finally:
            local.parameter_cache = None
            cache.clear()

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Draw random multipliers from `seed` in the forward passes of a ``with`` block, alike in every process."""
        self._local.seed = seed
        try:
            yield
        finally:
            self._local.seed = None

    def attach(self, module: nn.Module) -> None:
        """Open a forward state whenever `module` is called, unless inside of another call of the same model."""
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after, always_call=True)

    def attach_encoder(self, module: nn.Module) -> None:
        """Pool the output of `module`, the encoder, for decoder layers that are routed by it."""
        module.register_forward_hook(self._encoded)

    @contextmanager
    def open(self, state: ForwardState) -> Iterator[ForwardState]:
        """Open a forward state for the time of a ``with`` block; it does not become `last`."""
        self._local.stack.append(state)
        try:
            yield state
        finally:
            self._local.stack.pop()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered = self._local.entered
        if any(module is other for other in entered):
            entered.clear()  # Ctrl-C, unlike an `Exception`, ended a forward pass without its hooks
            self._local.stack.clear()
        entered.append(module)
        if len(entered) > 1:
            return
        self._local.stack.append(ForwardState())  # for `_after`, which also runs where reading fails
        arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        arguments.update(arguments.pop("kwargs", {}))
        state = self._local.stack[-1] = self.read(self, module, arguments)
        micro_batch, cache = self._local.accumulation.now, self._local.parameter_cache
        if (micro_batch is not None or cache is not None) and not traced():  # a program has no caches
            state.micro_batch, state.parameter_cache = micro_batch, cache
        state.seed = self._local.seed
        if module.training:
            self._wrap_checkpointing(module)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._local.entered.pop()
        if self._local.entered:
            return
        state = self._local.last = self._local.stack.pop()
        try:
            if output is not None and state.new_router_states and self.write is not None:
                positions = state._positions["decoder"]
                router_state = state.router_state or RouterState(self)
                first, *_ = state.new_router_states.values()
                real = first.weights.new_ones(positions.shape, dtype=torch.bool)
                real = real if positions.mask is None else positions.mask != 0
                router_state.advance(real, positions.after, state.new_router_states)
                self.write(state, output, router_state)
        finally:  # a block that runs again in the backward pass needs masks and encoder output, and nothing the cache
            state.kv_cache = state.router_state = None
            state.new_router_states, state._positions = {}, {}

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

        def run_in_state(*inputs: Any) -> Any:
            if self.active is outer:
                if grad and not torch.is_grad_enabled():
                    raise RuntimeError(
                        "reentrant gradient checkpointing would lose the balance loss: pass "
                        "activation_checkpointing_kwargs={'use_reentrant': False}"
                    )
                return run(*inputs)
            with self.open(replace(outer, layers={}, new_router_states={})):
                return run(*inputs)

        return checkpoint(run_in_state, *args)
