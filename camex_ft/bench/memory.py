"""Peak memory: of this process on a CPU, of torch's allocator on a GPU. All in bytes.

On Linux the process's peak (VmHWM) can be set back to what it holds now, so that building the inputs does not hide what
is measured after them. Elsewhere it cannot: then a peak is that since the process began, an upper bound.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): sets VmHWM back to VmRSS
GIB, MB = 2**30, 1e6


def resident() -> int:
    """Return the memory that this process holds now."""
    if STATUS.is_file():
        return _status("VmRSS")
    shown = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
    )
    return int(shown.stdout) * 1024


def peak_resident() -> int:
    """Return the most memory that this process has held since it began, or since `reset_peak`."""
    if STATUS.is_file():  # unlike ru_maxrss it does not start from the parent's
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> bool:
    """Give back what is free, then let the peak start from what is held now; False where the system has no such."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        # glibc keeps freed memory, which would hide as much of what is allocated next
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def extra(run: Callable[[], object], *, device: str) -> int:
    """Return the peak memory of `run` beyond what is held before it."""
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


def total() -> int:
    """Return the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _status(key: str) -> int:
    lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024
