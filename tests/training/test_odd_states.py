"""Checkpoints whose manifest is right and whose states are not: passed over, refused, or gone on from."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback

from camex_ft.training.checkpoint_folder import (
    OPTIMIZER,
    RANDOM,
    SCHEDULE,
    STATE,
    TRAINING,
    choose,
    ended,
    state_of,
    write_manifest,
)
from camex_ft.training.state_files import load_state, save_state
from camex_ft.utils.errors import UserError
from tests.helpers.training_runs import Stop, StopAfter, model, trainer

SETTINGS: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "max_steps": 6,
    "logging_steps": 3.0,
}
FILES = (STATE, OPTIMIZER, SCHEDULE, RANDOM.format(0), TRAINING.format(0))
ODD: list[Any] = [
    *(None, True, "ten", "", [], {}, [1], {"a": 1}, -1, 0, 1.5, 10**6, 10**30, -(10**30), 2**63),
    *(float("nan"), float("inf"), -float("inf"), "\ud800", "a\0b", "../..", [[[]]], {"": None}),
]
TENSORS: list[Any] = [torch.tensor(float("nan")), torch.zeros(3, 5), torch.zeros(0), torch.tensor([True])]
GONE = object()
Place = tuple[Any, ...]


def early() -> EarlyStoppingCallback:
    return EarlyStoppingCallback(early_stopping_patience=9)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of steps 2 and 4, of a run that was killed in step 6."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with pytest.raises(Stop):
        trainer(folder, model(), callbacks=[early(), StopAfter(5)], **SETTINGS).train()
    return folder


def go_on(folder: Path) -> str:
    """Go on as a run does; return what is said of checkpoints that are passed over, or the error."""
    checkpoint, notes = choose("auto", folder)
    if notes:
        return "\n".join(notes)  # and the run goes on from the one before
    own = trainer(folder, model(), callbacks=[early()], **SETTINGS)
    assert checkpoint is not None
    try:
        own.check(checkpoint)
        if ended(state_of(checkpoint)):
            own.finish(checkpoint)
        else:
            own.train(resume_from_checkpoint=str(checkpoint))
    except UserError as error:
        return str(error)
    return ""


def read(file: Path) -> Any:
    return json.loads(file.read_text()) if file.name == STATE else load_state(file)


def write(file: Path, state: Any) -> None:
    if file.name == STATE:
        file.write_text(json.dumps(state))
    else:
        save_state(state, file)
    write_manifest(file.parent if file.name == STATE else file.parent.parent)


def places(state: Any, above: Place = ()) -> Iterator[Place]:
    """Where there is a value, at any depth; of long lists the first and the last."""
    yield above
    if isinstance(state, dict):
        for key, value in state.items():
            yield from places(value, (*above, key))
    elif isinstance(state, (list, tuple)):
        for number in sorted({0, len(state) - 1}) if state else ():
            yield from places(state[number], (*above, number))


def changed(state: Any, place: Place, value: Any) -> Any:
    """A state with another value at a place, or none there."""
    if not place:
        return {} if value is GONE else value
    key, *rest = place
    made = list(state) if isinstance(state, tuple) else copy.copy(state)
    if rest or value is not GONE:
        made[key] = changed(state[key], tuple(rest), value)
    else:
        del made[key]
    return tuple(made) if isinstance(state, tuple) else made


def odd_copy(made: Path, target: Path, name: str, place: Place, value: Any) -> bool:
    """Copy the folder of checkpoints and change the newest one; return whether JSON can say so."""
    shutil.copytree(made, target)
    file = target / "checkpoint-4" / name
    try:
        write(file, changed(read(file), place, value))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False
    return True


# In the newest checkpoint: file, place, another value there, and what is said of it.
CASES: dict[str, tuple[str, Place, Any, str]] = {
    "a step in words": (STATE, ("global_step",), "ten", "wrong global_step: Input should be a valid integer"),
    "another step": (STATE, ("global_step",), 3, "is of step 3, and the folder is called checkpoint-4"),
    "a log entry without a step": (
        STATE,
        ("log_history", 0, "step"),
        GONE,
        "entry 0 in its log_history: it has no",
    ),
    "a metric in words": (STATE, ("log_history", 0, "eval_validation_accuracy"), "x", "expected a number"),
    "callbacks in a list": (STATE, ("stateful_callbacks",), [1], "has a wrong stateful_callbacks"),
    "a callback's method": (
        STATE,
        ("stateful_callbacks", "EarlyStoppingCallback", "attributes", "early_stopping_patience_counter"),
        [],
        "expected a number",
    ),
    "an optimizer's state in a list": (
        OPTIMIZER,
        (),
        [1],
        "optimizer.safetensors does not fit this run (TypeError",
    ),
    "without a moment": (
        OPTIMIZER,
        ("state", 0, "exp_avg"),
        GONE,
        "does not fit this run (KeyError: 'exp_avg')",
    ),
    "a moment of another shape": (
        OPTIMIZER,
        ("state", 0, "exp_avg"),
        torch.zeros(3, 5),
        "exp_avg is of [3, 5]",
    ),
    "a moment of one number": (
        OPTIMIZER,
        ("state", 1, "exp_avg_sq"),
        torch.tensor(1.0),
        "exp_avg_sq is of []",
    ),
    "a rate in words": (
        OPTIMIZER,
        ("param_groups", 0, "lr"),
        "x",
        "param_groups[0].lr is 'x', expected a number",
    ),
    "an unknown schedule": (SCHEDULE, (), {"speed": 3}, "it is of another schedule: ['speed']"),
    "a schedule's method": (SCHEDULE, ("step",), 3, "it is of another schedule"),
    "a schedule in words": (SCHEDULE, ("last_epoch",), "x", "it.last_epoch is 'x', expected a number"),
    "a generator of another kind": (RANDOM.format(0), ("python",), 3, "does not fit this run (TypeError"),
    "sums without a loss": (TRAINING.format(0), ("loss",), GONE, "it has no loss"),
    "routing of another layer": (TRAINING.format(0), ("routing",), {"x": 1}, "expected tensors by layer"),
    "a log line of a later step": (
        TRAINING.format(0),
        ("last_logged",),
        10**6,
        "last_logged is 1000000, at step 4",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_odd_state_is_said(name: str, made: Path, tmp_path: Path) -> None:
    file, place, value, said = CASES[name]
    if name == "a schedule's method":
        shutil.copytree(made, tmp_path / "odd")
        path = tmp_path / "odd" / "checkpoint-4" / file
        write(path, {**read(path), "step": 3})
    else:
        assert odd_copy(made, tmp_path / "odd", file, place, value)
    assert said in go_on(tmp_path / "odd")


def test_the_checkpoint_itself_is_gone_on_from(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "same")
    assert go_on(tmp_path / "same") == ""


def try_some(made: Path, folder: Path, count: int | None, seed: int) -> list[str]:
    """Go on from copies with an odd value somewhere; return what ended otherwise than it should."""
    tries = []
    for name in FILES:
        for place in places(read(made / "checkpoint-4" / name)):
            tries += [(name, place, value) for value in [*ODD, GONE, *(TENSORS if name != STATE else [])]]
    random.Random(seed).shuffle(tries)
    faults = []
    for number, (name, place, value) in enumerate(tries[:count]):
        target = folder / str(number)
        if odd_copy(made, target, name, place, value):
            try:
                go_on(target)
            except Exception as error:
                shown = "gone" if value is GONE else repr(value)
                faults.append(f"{name} {place}: {shown}: {type(error).__name__}: {str(error)[:300]}")
                print(faults[-1], flush=True)
        shutil.rmtree(target)
    return faults


def test_some_odd_values(made: Path, tmp_path: Path) -> None:
    assert try_some(made, tmp_path, 8, 0) == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_odd_values_everywhere(made: Path, tmp_path: Path) -> None:
    assert try_some(made, tmp_path, 1500, 1) == []
