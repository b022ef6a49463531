"""Call a function in a fresh process, whose memory holds nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import ParamSpec, TypeVar

import torch

from camex_ft.utils.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")
NO_MEMORY = ("can't allocate memory", "out of memory")  # as torch's allocators say it
ADVICE = "Choose smaller sizes; `bench layer` can leave the plain formula out: --skip-plain"


def in_child(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return ``function(*args, **kwargs)`` from a new process with as many threads as this one.

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
                f"a process that was to measure memory was ended, as happens when none is left. {ADVICE}"
            ) from error
        except RuntimeError as error:
            if not any(words in str(error) for words in NO_MEMORY):
                raise
            raise UserError(f"not enough memory: {str(error).splitlines()[0]}. {ADVICE}") from error
