"""A run that dies at a chosen point, in this process: from a point on nothing can be renamed or removed any more."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from camex_ft.config import load_config
from camex_ft.results.run_folder import InUse, RunFolder
from camex_ft.run import pipeline
from camex_ft.training import signals
from camex_ft.training.checkpoint_folder import checkpoints, damage
from camex_ft.utils.errors import UserError
from tests.helpers.killed_runs import differences, outcome, write


class Killed(BaseException):
    """What a killed process looks like from inside: nothing that would clean up gets far."""


@contextmanager
def killed_at(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Die where something is to be renamed to `name`, just before that."""
    dead = False

    def dying(real: Callable[..., Any], place: int | None) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal dead
            dead = dead or (place is not None and Path(args[place]).name == name)
            if dead:
                raise Killed
            return real(*args, **kwargs)

        return called

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace, 1))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree, None))
        patch.setattr(Path, "unlink", dying(Path.unlink, None))
        with pytest.raises(Killed):
            yield


def run(output: Path, protocol: str = "ties-ca", **training: Any) -> None:
    config = write(output, protocol, output.with_suffix(".yaml"))
    shorter = [
        f"training.{key}={value}" for key, value in {"max_steps": 4, "save_steps": 2, **training}.items()
    ]
    pipeline.run(load_config(str(config), shorter))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "results"
    run(output)
    return output


def test_killed_again_and_again_a_run_ends_as_its_twin(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "killed"
    for name in ("checkpoint-2", "checkpoint-4", "model", "record.json"):
        with killed_at(name, monkeypatch):
            run(output)
        (folder,) = (output / "runs").iterdir()
        assert not (folder / "record.json").exists()
        assert [damage(each) for each in checkpoints(folder / "checkpoints")] in ([], [None], [None, None])
    run(output)
    assert "going on from checkpoint-4" in capsys.readouterr().out
    assert list(differences(outcome(output), outcome(whole))) == []


def test_killed_between_its_record_and_its_end_a_run_is_shown_and_its_checkpoints_go(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results"
    shutil.copytree(whole, output)
    (folder,) = (output / "runs").iterdir()
    (folder / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    run(output)
    assert "is done already" in capsys.readouterr().out
    assert list(differences(outcome(output), outcome(whole))) == []


def test_a_signal_in_training_is_served_and_one_elsewhere_ends_at_once(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent to this very process."""
    output, real = tmp_path / "results", pipeline.load_splits
    before = [signals.signal.getsignal(number) for number in signals.SIGNALS]

    def sending(number: int) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            os.kill(os.getpid(), number)
            return real(*args, **kwargs)

        return called

    with signals.listening():
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "load_splits", sending(signals.signal.SIGTERM))
            with pytest.raises(signals.Stopped) as ended:
                run(output)
        assert (ended.value.step, ended.value.code) == (None, 143)
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "append_history", lambda *_: os.kill(os.getpid(), signals.signal.SIGINT))
            with pytest.raises(signals.Stopped) as ended:
                run(output, logging_steps=1)
        assert (ended.value.step, ended.value.code) == (1, 130)
        with monkeypatch.context() as patch:
            # a second one, before the step is over
            patch.setattr(
                pipeline.CamexTrainer,
                "compute_loss",
                lambda *_, **__: [os.kill(os.getpid(), signals.signal.SIGTERM) for _ in range(2)],
            )
            with pytest.raises(signals.Stopped) as ended:
                run(output)
        assert ended.value.step is None
    assert [signals.signal.getsignal(number) for number in signals.SIGNALS] == before


# -- two at once ------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
import camex_ft_cli
from camex_ft.results import RunFolder
from pathlib import Path
sys.argv = ["camex-ft", "run", "glue"]
with RunFolder(Path({folder!r})).alone():
    print("in", flush=True)
    time.sleep(100)
"""


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    command = [sys.executable, "-c", HOLD.format(folder=str(folder.path))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "in\n"
        with pytest.raises(InUse) as refused, folder.alone():
            pass
        said = str(refused.value)
        assert f"by process {first.pid} on " in said and ": camex-ft run glue" in said
        (folder.path / ".model.unfinished").mkdir()
        first.kill()
        first.wait()
    with folder.alone():
        owner = json.loads((folder.path / ".owner.json").read_text())
        assert owner["pid"] == os.getpid()
        assert not (folder.path / ".model.unfinished").exists()
    folder.remove_if_empty()
    assert not folder.path.exists()


def test_one_of_two_that_start_at_the_same_moment_gets_in(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    context = multiprocessing.get_context("fork")
    queue, barrier = context.SimpleQueue(), context.Barrier(4)
    children = [context.Process(target=_try, args=(folder, barrier, queue)) for _ in range(4)]
    for child in children:
        child.start()
    found = sorted(queue.get() for _ in children)
    for child in children:
        child.join()
    assert found == ["in", "refused", "refused", "refused"]


def _try(folder: RunFolder, barrier: Any, queue: Any) -> None:
    barrier.wait()
    try:
        with folder.alone():
            barrier.wait()
            queue.put("in")
    except UserError:
        barrier.wait()
        queue.put("refused")
