"""``training.auto_find_batch_size``: what is found, and that nothing is left of what failed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from camex_ft.config import TrainingConfig
from camex_ft.results import RunFolder
from camex_ft.training.arguments import training_arguments
from camex_ft.training.batches import out_of_memory
from camex_ft.training.callbacks.reporting import HistoryCallback
from camex_ft.training.checkpoint_folder import checkpoints, state_of
from camex_ft.training.trainer import CamexTrainer
from camex_ft.upcycling import expert_layers
from camex_ft.utils.errors import UserError
from tests.helpers.training_runs import BATCH, VALIDATION, model, same, trainer, weights

NO_ROOM = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"
    ),
}
FINDS = {"auto_find_batch_size": True}
BRIEF = {"max_steps": 5, "save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}


@pytest.fixture(autouse=True, scope="module")
def nothing_old() -> Iterator[None]:
    """Let collecting garbage, which every attempt does several times, leave out what was there before: 0.4 s each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Memory:
    """Lets an expert layer in the middle of the model run out of memory for more rows than there is room for.

    Attributes:
        failures: rows of the passes that failed.
        alive: what the failed passes made, and whether it was freed.
    """

    def __init__(self, made: CamexTrainer, room: int, *, after: int = 0, error: str = "gpu") -> None:
        self.room, self.calls, self.error = room, -after, NO_ROOM[error]
        self.failures: list[int] = []
        self.alive: list[weakref.ref[torch.Tensor]] = []
        layers = list(expert_layers(made.model).values())
        self.before = layers[0].register_forward_hook(self.seen)
        layers[1].outer_dropout.register_forward_pre_hook(self.limit)

    def seen(self, module: Any, args: Any, output: torch.Tensor) -> None:
        self.output = weakref.ref(output)

    def limit(self, module: Any, args: Any) -> None:
        if not module.training:
            return
        self.calls += 1
        if args[0].shape[0] > self.room and self.calls > 0:
            self.failures.append(args[0].shape[0])
            self.alive.append(self.output)
            raise self.error()


def small(folder: Path, protocol: str = "ties-ca", **settings: Any) -> CamexTrainer:
    return trainer(folder, model(protocol), **{"optim": "adamw_torch", "logging_steps": 1.0, **settings})


def lines(made: CamexTrainer) -> list[dict[str, Any]]:
    """The log without times."""
    return [
        {k: v for k, v in line.items() if not k.endswith(("_second", "_runtime"))}
        for line in made.state.log_history
    ]


def recorded(made: CamexTrainer, folder: Path) -> RunFolder:
    """Let the trainer keep a history, as a run does."""
    kept = RunFolder(folder)
    made.add_callback(HistoryCallback(kept.append_history, lambda: made.monitor.loads, kept.rewind_history))
    return kept


@pytest.mark.parametrize(
    ("protocol", "after", "accumulation", "error"),
    [
        ("ties-ca", 0, 1, "gpu"),  # at once
        ("dare-ca", 1, 2, "gpu"),  # at the second micro-batch of a step
        ("fisher", 3, 1, "cpu"),  # after a checkpoint; keeps a statistic, which was updated
        pytest.param("smoe", 2, 1, "gpu", marks=pytest.mark.slow),
        # carries its base expert, and Nash weights from step to step
        pytest.param("namex-full", 3, 2, "cpu", marks=pytest.mark.slow),
    ],
)
def test_it_is_the_run_that_had_started_with_that_size(
    protocol: str, after: int, accumulation: int, error: str, tmp_path: Path
) -> None:
    """Weights, buffers, log, history and speed; random masks, noise, dropout and order of rows included."""
    settings = {"gradient_accumulation_steps": accumulation, **BRIEF}
    expected = small(tmp_path / "expected", protocol, per_device_train_batch_size=2, **settings)
    plain = recorded(expected, tmp_path / "expected")
    expected.train()

    found = small(tmp_path / "found", protocol, per_device_train_batch_size=BATCH, **FINDS, **settings)
    kept = recorded(found, tmp_path / "found")
    memory = Memory(found, 2, after=after, error=error)
    result = found.train()
    assert memory.failures == [BATCH]
    assert found.state.train_batch_size == found.args.train_batch_size == 2
    assert same(weights(found), weights(expected)) == []
    assert lines(found) == lines(expected)
    without_times = [
        [
            {k: v for k, v in line.items() if not k.endswith(("_second", "_runtime"))}
            for line in one.read_history()
        ]
        for one in (kept, plain)
    ]
    assert without_times[0] == without_times[1]
    assert int(found.progress.tokens) == int(expected.progress.tokens)
    assert found.monitor.loads == expected.monitor.loads
    names = [path.name for path in checkpoints(tmp_path / "found")]
    assert names == [path.name for path in checkpoints(tmp_path / "expected")]
    speed = found.speed(result.metrics)
    assert speed is not None and speed.samples > 0


def test_it_halves_until_there_is_room_and_frees_what_failed(tmp_path: Path) -> None:
    found = small(tmp_path, per_device_train_batch_size=8, **FINDS, eval_strategy="no", save_strategy="no",
                  load_best_model_at_end=False)  # fmt: skip
    memory = Memory(found, 1)
    held: list[int] = []

    class Check(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            gc.collect()
            held.append(sum(ref() is not None for ref in memory.alive))
            assert found.context.last is None and found.context.active is None

    found.add_callback(Check())
    found.train()
    assert memory.failures == [8, 4, 2] and found.state.train_batch_size == 1
    assert held == [0, 0, 0, 0]


def test_going_on_keeps_the_size_that_was_found(tmp_path: Path) -> None:
    """A run that is stopped after it found its size, and one that never stopped, are the same."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": None,
        "eval_strategy": "no",
        "load_best_model_at_end": False,
    }
    whole = small(tmp_path / "whole", per_device_train_batch_size=2, **settings)
    whole.train()
    first = small(tmp_path / "run", **FINDS, **settings)
    Memory(first, 2, after=3)
    first.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    newest = checkpoints(tmp_path / "run")[0]
    assert newest.name == "checkpoint-4" and state_of(newest).train_batch_size == 2

    second = small(tmp_path / "run", **FINDS, **settings)
    memory = Memory(second, 2)
    second.check(newest)
    second.train(resume_from_checkpoint=str(newest))
    assert memory.failures == [] and second.args.train_batch_size == 2
    assert same(weights(second), weights(whole)) == []

    ended = small(tmp_path / "run", **FINDS, **settings)
    ended.finish(checkpoints(tmp_path / "run")[0])
    assert ended.args.train_batch_size == 2  # what the record says

    third = small(tmp_path / "run", **FINDS, **settings)
    Memory(third, 1)
    with pytest.raises(UserError, match=r"checkpoint-4 was written by a run that takes 2 rows.*--force"):
        third.train(resume_from_checkpoint=str(newest))
    assert newest.is_dir()


def test_what_never_fits_is_told(tmp_path: Path) -> None:
    found = small(tmp_path, **FINDS)
    Memory(found, 0)
    with pytest.raises(UserError, match=r"not even a single row.*activation_checkpointing"):
        found.train()


def test_an_evaluation_without_room_is_told_and_changes_nothing(tmp_path: Path) -> None:
    found = small(tmp_path, **FINDS)

    def full(module: Any, args: Any) -> None:
        if not module.training:
            raise NO_ROOM["gpu"]()

    next(iter(expert_layers(found.model).values())).register_forward_pre_hook(full)
    with pytest.raises(UserError, match=f"per_device_eval_batch_size below {BATCH}"):
        found.train()
    assert found.args.train_batch_size == BATCH


def test_other_errors_and_other_runs_are_left_alone(tmp_path: Path) -> None:
    assert not out_of_memory(RuntimeError("shapes do not fit")) and not out_of_memory(KeyboardInterrupt())
    assert out_of_memory(MemoryError()) and all(out_of_memory(made()) for made in NO_ROOM.values())
    Memory(found := small(tmp_path), 2)
    with pytest.raises(torch.OutOfMemoryError):
        found.train()
    Memory(found := small(tmp_path, **FINDS), 2).error = lambda: RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes"):
        found.train()
    assert VALIDATION  # evaluations never shrink a batch


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.TrainingArguments.world_size", property(lambda self: 2))
    with pytest.raises(UserError, match="auto_find_batch_size: one of several processes"):
        training_arguments(TrainingConfig(use_cpu=True, **FINDS), output=Path("x"), best=None)
