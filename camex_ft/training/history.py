"""The history of a run: one line a logging step while it goes, epochs and best epoch when it is over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EVAL = "eval_"
# How names of what an evaluation took end: time, and with `skip_memory_metrics: false` memory.
COST = (
    *("runtime", "samples_per_second", "steps_per_second", "preparation_time"),
    *("alloc_delta", "peaked_delta"),
)


class HistoryCallback(TrainerCallback):
    """Hands every log entry, with its step and epoch, to `write`, in the main process alone.

    Args:
        write: takes an entry.
        rewind: drops the entries after a step, which are written again: those of an attempt that ran out of memory.
        loads: the load by layer since the last entry of a training step, which that entry gets as ``routing_load``; it
            is kept from the log itself, which is for people.
    """

    def __init__(
        self,
        write: Callable[[dict[str, Any]], None],
        loads: Callable[[], Mapping[str, list[float]]] = dict,
        rewind: Callable[[int], None] | None = None,
    ) -> None:
        self.write, self.loads, self.rewind = write, loads, rewind

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop what an earlier attempt wrote."""
        if self.rewind is not None and state.is_world_process_zero:
            self.rewind(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one entry."""
        if state.is_world_process_zero:
            entry = {"step": state.global_step, "epoch": state.epoch, **(logs or {})}
            loads = self.loads() if "loss" in entry else {}
            if loads:
                entry["routing_load"] = {
                    layer: [round(x, 4) for x in shares] for layer, shares in loads.items()
                }
            self.write(entry)


class Outcome(NamedTuple):
    """Best and last value of a metric, and the epoch of the best."""

    best: float | None
    best_epoch: float | None
    last: float | None


def only_metrics(entry: Mapping[str, Any], *, prefix: str = EVAL) -> dict[str, float]:
    """Return the metrics of an evaluation's log entry, without the prefix, time and memory."""
    return {
        k.removeprefix(prefix): v for k, v in entry.items() if k.startswith(prefix) and not k.endswith(COST)
    }


def epochs(log_history: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return one entry an evaluation: step, epoch and the metrics of all data sets, as `only_metrics` has them."""
    found: dict[int, dict[str, float]] = {}
    for entry in log_history:
        metrics = only_metrics(entry)
        if metrics:
            row = found.setdefault(entry["step"], {"step": entry["step"], "epoch": entry["epoch"]})
            row.update(metrics)
    return list(found.values())


def best_and_last(rows: list[dict[str, float]], metric: str, *, greater_is_better: bool = True) -> Outcome:
    """Return the outcome in `metric`; the first of equal epochs is the best one."""
    scored = [row for row in rows if row.get(metric) is not None and row[metric] == row[metric]]
    if not scored:
        return Outcome(None, None, None)
    best = (max if greater_is_better else min)(scored, key=lambda row: row[metric])
    return Outcome(best[metric], best["epoch"], rows[-1].get(metric))
