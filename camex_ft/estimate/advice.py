"""Settings that would make a step fit, tried one by one and together, each with its own cost estimate.

Cheapest first: those that leave the result as it is (a smaller batch with more micro-batches, gradient checkpointing,
domain vectors computed in every micro-batch, an engine that shares out), then half precision, then those that train
less or have fewer experts. Together they are added in this order until the step fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from camex_ft.config import Config
from camex_ft.config.rules import broken
from camex_ft.estimate.memory import Engine, Where
from camex_ft.utils.registry import PROTOCOLS

Peak = Callable[[Config, Where], int]
SHARING = "fsdp"


@dataclass(frozen=True, kw_only=True)
class Way:
    """Settings, as on the command line, and the peak of a step with them, in bytes."""

    settings: tuple[str, ...]
    peak: int


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Settings that make a step fit into `limit` bytes: each change alone, and those that fit together, if any."""

    limit: int
    alone: tuple[Way, ...]
    together: Way | None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A configuration and its processes, with the changes that led to it."""

    settled: Config
    where: Where
    gpu: bool
    settings: tuple[str, ...] = ()

    def extra(self, *keys: str) -> bool:
        """Return whether one of the Trainer's own arguments is on."""
        fields = self.settled.training.model_extra or {}
        return any(fields.get(key) for key in keys)

    def changed(self, section: str, **values: object) -> Candidate:
        """Return it with other values in a section of the configuration."""
        part = getattr(self.settled, section).model_copy(update=values)
        texts = (str(v).lower() if isinstance(v, bool) else v for v in values.values())
        settings = {f"{section}.{key}": text for key, text in zip(values, texts, strict=True)}
        others = (s for s in self.settings if s.partition("=")[0] not in settings)
        return replace(
            self,
            settled=self.settled.model_copy(update={section: part}),
            settings=(*others, *(f"{key}={text}" for key, text in settings.items())),
        )


# A change returns None where it changes nothing.
Change = Callable[[Candidate], Candidate | None]


def advise(settled: Config, where: Where, limit: int, peak: Peak, *, gpu: bool) -> Advice:
    """Return settings with which a step would fit into `limit` bytes.

    Args:
        settled: the resolved configuration.
        where: its processes.
        limit: bytes of a device.
        peak: returns the peak of a configuration's step.
        gpu: on a GPU.
    """
    start = Candidate(settled=settled, where=where, gpu=gpu)
    changes = [batch_of(size) for size in halves(settled.training.per_device_train_batch_size)]
    changes += [checkpointing, vectors_again, shared_out, half, tuned("experts"), fewer, tuned("lora")]
    candidates = [_apply([change], start) for change in changes]
    alone = tuple(Way(settings=c.settings, peak=peak(c.settled, c.where)) for c in candidates if c)
    return Advice(limit=limit, alone=alone, together=_together(start, changes, limit, peak))


def _together(start: Candidate, changes: list[Change], limit: int, peak: Peak) -> Way | None:
    """Add changes that help until the step fits, then leave out those, the dearest first, that it fits without."""
    best, least = start, peak(start.settled, start.where)
    chosen: list[Change] = []
    for change in changes:
        candidate = _apply([change], best)
        if candidate is not None and (size := peak(candidate.settled, candidate.where)) < least:
            best, least = candidate, size
            chosen.append(change)
        if least <= limit:
            break
    else:
        return None
    for change in reversed(chosen[:-1]):
        others = [other for other in chosen if other is not change]
        candidate = _apply(others, start)
        if candidate is not None and (size := peak(candidate.settled, candidate.where)) <= limit:
            chosen, best, least = others, candidate, size
    return Way(settings=best.settings, peak=least)


def _apply(changes: list[Change], candidate: Candidate) -> Candidate | None:
    """Return the result of several changes; None where one changes nothing or breaks a rule of configurations."""
    for change in changes:
        result = change(candidate)
        if result is None or list(broken(result.settled)):
            return None
        candidate = result
    return candidate


def halves(rows: int) -> Iterator[int]:
    """Yield batch sizes that divide the one before by 2, down to an odd one."""
    while rows % 2 == 0:
        rows //= 2
        yield rows


def batch_of(rows: int) -> Change:
    """Return the change to micro-batches of `rows` rows, as many as make the same batch."""

    def change(candidate: Candidate) -> Candidate | None:
        training = candidate.settled.training
        times = training.per_device_train_batch_size // rows
        if times < 2:
            return None
        steps = int((training.model_extra or {}).get("gradient_accumulation_steps") or 1) * times
        return candidate.changed(
            "training", per_device_train_batch_size=rows, gradient_accumulation_steps=steps
        )

    return change


def checkpointing(candidate: Candidate) -> Candidate | None:
    """Change to gradient checkpointing."""
    if candidate.extra("activation_checkpointing", "gradient_checkpointing"):
        return None
    return candidate.changed("training", activation_checkpointing=True)


def vectors_again(candidate: Candidate) -> Candidate | None:
    """Compute transformed domain vectors in every micro-batch."""
    steps = (candidate.settled.training.model_extra or {}).get("gradient_accumulation_steps") or 1
    return candidate.changed("merging", keep_vectors=False) if int(steps) > 1 else None


def shared_out(candidate: Candidate) -> Candidate | None:
    """Share out weights, gradients and the optimizer's state over the processes."""
    engine = candidate.where.engine
    if engine.processes == 1 or engine.shares_weights:
        return None
    where = replace(candidate.where, engine=Engine(name=SHARING, processes=engine.processes))
    return replace(candidate, where=where, settings=(*candidate.settings, f"--engine {SHARING}"))


def half(candidate: Candidate) -> Candidate | None:
    """Change to autocast in bfloat16."""
    if candidate.extra("bf16", "fp16"):
        return None
    here = {} if candidate.gpu else {"use_cpu": True}  # without it the Trainer looks for a GPU
    return candidate.changed("training", bf16=True, **here)


def tuned(mode: str) -> Change:
    """Return the change to another `tuning.mode`."""
    return lambda candidate: (
        None if candidate.settled.tuning.mode in (mode, "lora") else candidate.changed("tuning", mode=mode)
    )


def fewer(candidate: Candidate) -> Candidate | None:
    """Have half as many experts."""
    merging = candidate.settled.merging
    experts = merging.experts // 2
    if PROTOCOLS.get(merging.protocol).form == "dense" or experts < 2 or (merging.top_k or 0) > experts:
        return None
    return candidate.changed("merging", experts=experts)
