"""Properties of the machine: cores, CUDA, the Hugging Face hub and its cache."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from camex_ft.utils import hub

SECONDS = 2.0


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def cuda_is_there() -> bool:
    """Return whether torch sees a CUDA device; torch is imported only on a machine with the driver of one."""
    if "torch" not in sys.modules and not _driver_is_there():
        return False
    import torch

    return torch.cuda.is_available()


def _driver_is_there() -> bool:
    """Return whether Linux has NVIDIA's driver or AMD's, which torch needs; True on other systems."""
    if sys.platform != "linux" or os.path.exists("/dev/kfd") or os.path.exists("/dev/dxg"):
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@cache
def hub_answers() -> bool:
    """Return whether the hub answers within two seconds, name look-up included; not asked under ``HF_HUB_OFFLINE``."""
    from huggingface_hub import constants

    datasets_offline = os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if constants.HF_HUB_OFFLINE or datasets_offline:
        return False
    answered: list[int] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            with urllib.request.urlopen(request, timeout=SECONDS) as reply:
                answered.append(reply.status)
        except (OSError, ValueError):
            return

    # A time limit on the socket does not bound the look-up of the name, so the question has a thread of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return bool(answered)


def model_is_cached(name: str) -> bool:
    """Return whether the hub cache holds a model's configuration and weights."""
    folder = hub.snapshot(name, "model")
    if folder is None or not (folder / "config.json").exists():
        return False
    return any(path.suffix in (".safetensors", ".bin", ".gguf") for path in folder.iterdir())


def architecture_is_cached(name: str) -> bool:
    """Return whether the hub cache holds a model's configuration, with or without weights."""
    folder = hub.snapshot(name, "model")
    return folder is not None and (folder / "config.json").exists()


def data_are_cached(name: str, configuration: str) -> bool:
    """Return whether the hub cache, or that of `datasets`, holds one configuration of a data set."""
    folder = hub.snapshot(name, "dataset")
    inside = "data" if configuration == "default" else configuration
    files = folder is not None and any(file.is_file() for file in folder.glob(f"{inside}/*"))
    return files or hub.is_prepared(name, configuration)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Answers about the machine, each computed when it is asked for; tests put in others."""

    cuda: Callable[[], bool] = cuda_is_there
    hub: Callable[[], bool] = hub_answers
    model: Callable[[str], bool] = model_is_cached
    architecture: Callable[[str], bool] = architecture_is_cached
    data: Callable[[str, str], bool] = data_are_cached
