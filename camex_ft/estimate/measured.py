"""Memory and time of real work: the peak of a process or a GPU, and the training steps of ``camex-ft plan --measure``.

On Linux the process's peak (VmHWM) can be set back to what it holds now, so that building the inputs does not hide
later measurements. Elsewhere it cannot: there a peak is that since the process began, an upper bound.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, default_data_collator

from camex_ft.backbones.base import plain_type
from camex_ft.config import Config
from camex_ft.estimate.columns import materials
from camex_ft.estimate.survey import Batch
from camex_ft.training.arguments import training_arguments
from camex_ft.training.cost import Parameters, count_parameters
from camex_ft.training.trainer import CamexTrainer
from camex_ft.utils.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): sets VmHWM back to VmRSS
NO_MEMORY = ("can't allocate memory", "out of memory")  # as torch's allocators say it
ADVICE = "Choose smaller sizes; `bench layer` can leave the plain formula out: --skip-plain"
STEPS = 3  # from the second on, the optimizer's state and freed memory are there
QUIET = {
    "num_train_epochs": 1.0,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "train_sampling_strategy": "sequential",
    "disable_tqdm": True,
    "logging_strategy": "no",
}


def resident() -> int:
    """Return the bytes that this process holds now."""
    if STATUS.is_file():
        return _status("VmRSS")
    command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1024


def peak_resident() -> int:
    """Return the most bytes that this process has held since it began, or since `reset_peak`."""
    if STATUS.is_file():  # unlike ru_maxrss it does not start from the parent's
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(key: str) -> int:
    lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def reset_peak() -> bool:
    """Give back free memory, then start the peak from what is held now; False where the system cannot."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        # freed memory that glibc holds would hide as much of what is allocated next
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def extra_memory(run: Callable[[], object], *, device: str) -> int:
    """Return the peak bytes of `run` beyond those that are held before it."""
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    reset_peak()
    before = resident()
    run()
    return max(0, peak_resident() - before)


def in_child(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return ``function(*args, **kwargs)`` from a fresh process with as many threads, whose memory holds nothing else.

    Function, arguments and result are pickled, so the function is one of a module.

    Raises:
        UserError: the process asked for more memory than there is, or was ended, as Linux does when memory runs out.
    """
    with ProcessPoolExecutor(
        max_workers=1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(torch.get_num_threads(),),
    ) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool as error:
            raise UserError(
                "the process that measures memory was killed, as happens when the machine runs out of memory. "
                f"{ADVICE}"
            ) from error
        except RuntimeError as error:
            if not any(words in str(error) for words in NO_MEMORY):
                raise
            raise UserError(f"not enough memory: {str(error).splitlines()[0]}. {ADVICE}") from error


# -- training steps ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Time and memory of training steps.

    Attributes:
        parameters: of the model.
        peak: the most bytes held in the steps, by the process, or on a GPU by torch.
        framework: bytes that the process held before there was a model; 0 on a GPU.
        seconds: of the shortest optimizer step, the one that others disturbed least.
        steps: how many there were.
    """

    parameters: Parameters
    peak: int
    framework: int
    seconds: float
    steps: int


def measure(settled: Config, *, steps: int = STEPS) -> Measured:
    """Take optimizer steps of a configuration in a fresh process, and return their peak memory and time.

    The model is the run's own, with random weights; its rows are random and as long as they can be; the Trainer is that
    of a run.

    Args:
        settled: the resolved configuration.
        steps: at least 2.

    Raises:
        UserError: there is not enough memory, or the configuration is at fault.
    """
    return in_child(_measure, settled, steps)


def _measure(settled: Config, steps: int) -> Measured:
    reset_peak()
    framework = resident()
    model, batch = materials(settled)
    training = settled.training.model_copy(update={**QUIET, "max_steps": steps})
    rows = [random_row(model, batch, seed=i) for i in range(steps * batch.steps * batch.rows)]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = CamexTrainer(
            model=model,
            args=training_arguments(training, output=Path(folder), best=None),
            train_dataset=rows,
            data_collator=default_data_collator,
            callbacks=[clock],
            router_learning_rate=training.router_learning_rate,
            curvature_learning_rate=training.curvature_learning_rate,
        )
        reset_peak()
        on_gpu = trainer.args.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    return Measured(
        parameters=count_parameters(model),
        peak=torch.cuda.max_memory_allocated() if on_gpu else peak_resident(),
        framework=0 if on_gpu else framework,
        seconds=clock.shortest,
        steps=steps,
    )


class Clock(TrainerCallback):
    """Times optimizer steps."""

    def __init__(self) -> None:
        self.started, self.shortest = 0.0, float("inf")

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop, once the device is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.shortest = min(self.shortest, time.perf_counter() - self.started)


def random_row(model: PreTrainedModel, batch: Batch, *, seed: int) -> dict[str, Tensor]:
    """Return a row of random tokens at its full length, and labels of the kind that the head takes."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.vocab_size, (batch.length,), generator=generator)
    row = {"attention_mask": torch.ones_like(ids)}
    if plain_type(config.model_type) == "t5":
        ids[ids == config.eos_token_id] = 2  # its classifier reads the one end token
        ids[-1] = config.eos_token_id
    if model.get_output_embeddings() is None:
        regression = config.num_labels == 1
        row["labels"] = torch.tensor(0.5) if regression else torch.tensor(seed % config.num_labels)
    else:
        row["labels"] = ids[: batch.target] if batch.target else ids
    return {"input_ids": ids, **row}
