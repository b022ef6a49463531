"""Nested states <-> one safetensors file each: tensors as they are, everything else as JSON in the header. No pickle.

A state consists of dicts, lists, tuples, None, booleans, integers, floats (also inf and nan), text, dtypes, NumPy
arrays and numbers, and tensors: all that optimizers, schedules and random generators have. Saving is exact.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from camex_ft.utils.errors import UserError, is_full

KEY = "state"  # of the header


def save_state(state: Any, file: Path) -> None:
    """Write a state.

    Raises:
        TypeError: it holds a value of another type; the message names its place.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(state, tensors, ""), allow_nan=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={KEY: text})


def load_state(file: Path) -> Any:
    """Return a state that `save_state` wrote, with its tensors on the CPU.

    Raises:
        ValueError, KeyError, safetensors.SafetensorError: the file holds no state.
    """
    with safe_open(file, "pt") as saved:
        header = saved.metadata() or {}
        if KEY not in header:
            raise ValueError(f"{file.name} holds no state")
        names = list(saved.keys())
        return _decode(json.loads(header[KEY]), {name: saved.get_tensor(name) for name in names})


@contextmanager
def loading(file: Path) -> Iterator[None]:
    """Convert errors of the body, which loads a file of a checkpoint, to `UserError`."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each optimizer, schedule and generator has errors of its own
        if is_full(error):
            raise
        message = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"training.resume: {file} does not fit this run ({type(error).__name__}: {message[:200]}). Expected a "
            "checkpoint that this run wrote: remove it to resume from the one before, or start anew with "
            "training.resume=never"
        ) from error


def check_form(state: Any, like: Any, place: str = "it") -> None:
    """Raise `ValueError` unless a state has the form of another one: the same kinds of values, lengths and shapes.

    Args:
        state: a state. Of a mapping, the keys that both have are compared.
        like: the current state of the same object; None accepts anything.
        place: name of the state in messages.
    """
    if like is None:
        return
    if isinstance(like, Mapping):
        if not isinstance(state, Mapping):
            raise ValueError(f"{place} is {state!r:.80}, expected a mapping")
        for key in state.keys() & like.keys():
            check_form(state[key], like[key], f"{place}.{key}")
    elif isinstance(like, (list, tuple)):
        if not isinstance(state, (list, tuple)) or len(state) != len(like):
            raise ValueError(f"{place} is {state!r:.80}, expected a list of {len(like)}")
        for number, (item, value) in enumerate(zip(state, like, strict=True)):
            check_form(item, value, f"{place}[{number}]")
    elif isinstance(like, Tensor):
        if not isinstance(state, Tensor) or state.shape != like.shape:
            raise ValueError(f"{place} is {state!r:.80}, expected a tensor of {list(like.shape)}")
    elif isinstance(like, (int, float)) and not isinstance(like, bool):
        if isinstance(state, bool) or not isinstance(state, (int, float, Tensor)):
            raise ValueError(f"{place} is {state!r:.80}, expected a number")
    elif not isinstance(state, type(like)):
        raise ValueError(f"{place} is {state!r:.80}, expected {type(like).__name__}")


def random_state(all_devices: bool = True) -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators; of all GPUs, or of the current one alone."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all() if all_devices else torch.cuda.get_rng_state()
    return states


def set_random_state(states: Mapping[str, Any]) -> None:
    """Restore the result of `random_state`; that of GPUs where their number is the same."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    cuda = states.get("cuda")
    if cuda is None or not torch.cuda.is_available():
        return
    if isinstance(cuda, Tensor):
        torch.cuda.set_rng_state(cuda)
    elif len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


def _encode(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """Return a value as JSON, in which each tensor is a name; tensors are added to `tensors` under these names."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        return {"tensor": _add(_unshared(value, tensors), tensors)}
    if isinstance(value, (np.ndarray, np.generic)):
        kind = "array" if isinstance(value, np.ndarray) else "number"
        return {kind: _add(torch.from_numpy(np.array(value, order="C")), tensors)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, tensors, f"{place}[{n}]") for n, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        entries = value.items()
        return {
            "dict": [[_encode(k, tensors, place), _encode(v, tensors, f"{place}.{k}")] for k, v in entries]
        }
    for kind_of in (str, int, float):
        if isinstance(value, kind_of):  # an enumeration's value
            return _encode(kind_of(value), tensors, place)
    raise TypeError(f"{place.lstrip('.') or 'the state'} is of type {type(value).__name__}")


def _unshared(tensor: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return a tensor on the CPU that shares its memory with no other one, which the format asks for."""
    alone = tensor.detach().cpu().contiguous()
    shared = alone.untyped_storage().nbytes() != alone.nbytes
    return (
        alone.clone() if shared or any(alone.data_ptr() == t.data_ptr() for t in tensors.values()) else alone
    )


def _add(tensor: Tensor, tensors: dict[str, Tensor]) -> str:
    name = str(len(tensors))
    tensors[name] = tensor
    return name


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    if kind == "float":
        return float(content)
    if kind == "dtype":
        return getattr(torch, content) if isinstance(getattr(torch, content, None), torch.dtype) else None
    if kind in ("array", "number"):
        array = tensors[content].numpy()
        return array if kind == "array" else array[()]
    if kind == "tensor":
        return tensors[content]
    raise ValueError(f"a state holds a {kind}, which this version does not know")
