"""Settings that would make a step fit, tried one by one and together, by planning again.

Cheapest first: what leaves the result as it is (a smaller batch with more micro-batches, gradient checkpointing, domain
vectors made again, an engine that shares out), then what changes its precision, then what trains less or has fewer
experts. Together they are added in this order until the step fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from camex_ft.config import Config
from camex_ft.config.rules import broken
from camex_ft.estimate.engines import Engine
from camex_ft.estimate.memory import MAPPED, MOST_MAPPED, Where
from camex_ft.utils.registry import PROTOCOLS

Peak = Callable[[Config, Where], int]
SHARING = "fsdp"


@dataclass(frozen=True, kw_only=True)
class Way:
    """Settings that a step was planned with again.

    Attributes:
        settings: what is changed, as on the command line.
        peak: bytes that it would take.
    """

    settings: tuple[str, ...]
    peak: int


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Settings that would make a step fit.

    Attributes:
        limit: bytes of a device.
        alone: each change by itself.
        together: the changes that fit together, in the order of their cost, or None where all of them do not.
    """

    limit: int
    alone: tuple[Way, ...]
    together: Way | None


@dataclass(frozen=True, kw_only=True)
class State:
    """A configuration and what it runs on, a GPU or not, while changes are made."""

    settled: Config
    where: Where
    gpu: bool
    settings: tuple[str, ...] = ()


Change = Callable[[State], State | None]


def advise(settled: Config, where: Where, limit: int, peak: Peak, *, gpu: bool) -> Advice:
    """Return what would make a step fit into `limit` bytes.

    Args:
        settled: the resolved configuration.
        where: what it runs on.
        limit: bytes of a device.
        peak: plans a configuration again.
        gpu: on a GPU, whose allocator leaves no holes to be avoided.
    """
    start = State(settled=settled, where=where, gpu=gpu)
    changes = [batch_of(size) for size in halves(settled.training.per_device_train_batch_size)]
    changes += [checkpointing, apart, shared_out, *([] if gpu else [mapped]), half]
    changes += [tuned("experts"), fewer, tuned("lora")]
    alone = []
    for change in changes:
        made = _made(change, start)
        if made is not None:
            alone.append(Way(settings=made.settings, peak=peak(made.settled, made.where)))
    return Advice(limit=limit, alone=tuple(alone), together=_together(start, changes, limit, peak))


def _together(start: State, changes: list[Change], limit: int, peak: Peak) -> Way | None:
    """Add changes that help until the step fits, then leave out those, the dearest first, that it fits without."""
    now, least = start, peak(start.settled, start.where)
    chosen: list[Change] = []
    for change in changes:
        made = _made(change, now)
        if made is not None and (size := peak(made.settled, made.where)) < least:
            now, least = made, size
            chosen.append(change)
        if least <= limit:
            break
    else:
        return None
    for change in reversed(chosen[:-1]):
        fewer_ = [each for each in chosen if each is not change]
        made = _all(fewer_, start)
        if made is not None and (size := peak(made.settled, made.where)) <= limit:
            chosen, now, least = fewer_, made, size
    return Way(settings=now.settings, peak=least)


def _all(changes: list[Change], state: State) -> State | None:
    """Return what changes make one after the other, or None where one of them is none any more."""
    for change in changes:
        made = _made(change, state)
        if made is None:
            return None
        state = made
    return state


def halves(rows: int) -> Iterator[int]:
    """Yield batch sizes that divide the one before by 2, down to an odd one."""
    while rows % 2 == 0:
        rows //= 2
        yield rows


def batch_of(rows: int) -> Change:
    """Return the change to micro-batches of `rows` rows, as many as make the same batch."""

    def change(state: State) -> State | None:
        training = state.settled.training
        times = training.per_device_train_batch_size // rows
        if times < 2:
            return None
        steps = int((training.model_extra or {}).get("gradient_accumulation_steps") or 1) * times
        settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        kept = tuple(s for s in state.settings if s.partition("=")[0].partition(".")[2] not in settings)
        made = _with(state, "training", **settings)
        return replace(made, settings=(*kept, *(f"training.{k}={v}" for k, v in settings.items())))

    return change


def checkpointing(state: State) -> State | None:
    """Change to gradient checkpointing."""
    extra = state.settled.training.model_extra or {}
    if extra.get("activation_checkpointing") or extra.get("gradient_checkpointing"):
        return None
    return _with(state, "training", activation_checkpointing=True)


def apart(state: State) -> State | None:
    """Make domain vectors again in every micro-batch."""
    steps = (state.settled.training.model_extra or {}).get("gradient_accumulation_steps") or 1
    return _with(state, "merging", keep_vectors=False) if int(steps) > 1 else None


def shared_out(state: State) -> State | None:
    """Share out weights, gradients and the optimizer's state over the processes."""
    engine = state.where.engine
    if engine.processes == 1 or engine.shares_weights:
        return None
    other = replace(state.where, engine=Engine(name=SHARING, processes=engine.processes))
    return replace(state, where=other, settings=(*state.settings, f"--engine {SHARING}"))


def half(state: State) -> State | None:
    """Change to autocast in bfloat16."""
    extra = state.settled.training.model_extra or {}
    if extra.get("bf16") or extra.get("fp16"):
        return None
    here = {} if state.gpu else {"use_cpu": True}  # without which the Trainer looks for a GPU
    return _with(state, "training", bf16=True, **here)


def mapped(state: State) -> State | None:
    """Have large tensors given back to the system when they are freed."""
    if state.where.mapped:
        return None
    settings = (*state.settings, f"{MAPPED}={MOST_MAPPED}")
    return replace(state, where=replace(state.where, mapped=True), settings=settings)


def tuned(mode: str) -> Change:
    """Return the change to another `tuning.mode`."""
    return lambda state: (
        None if state.settled.tuning.mode in (mode, "lora") else _with(state, "tuning", mode=mode)
    )


def fewer(state: State) -> State | None:
    """Have half as many experts."""
    experts = state.settled.merging.experts // 2
    k = state.settled.merging.top_k
    dense = PROTOCOLS.get(state.settled.merging.protocol).form == "dense"
    if dense or experts < 2 or (k or 0) > experts:
        return None
    return _with(state, "merging", experts=experts)


def _with(state: State, section: str, **values: object) -> State:
    part = getattr(state.settled, section).model_copy(update=values)
    said = tuple(
        f"{section}.{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in values.items()
    )
    settled = state.settled.model_copy(update={section: part})
    return replace(state, settled=settled, settings=(*state.settings, *said))


def _made(change: Change, state: State) -> State | None:
    """Return what a change makes, where it is one and keeps the rules of configurations."""
    made = change(state)
    return None if made is None or list(broken(made.settled)) else made
