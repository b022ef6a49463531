"""Nested state <-> one safetensors file: tensors as they are, the rest as JSON in its header. No pickle, and exact.

A state is made of dicts, lists, tuples, None, booleans, whole numbers, floats (also inf and nan), text, dtypes, NumPy's
arrays and numbers, and tensors. Optimizers, schedules and random generators have no more.
"""

from __future__ import annotations

import json
import math
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


def save(state: Any, file: Path) -> None:
    """Write a state.

    Raises:
        TypeError: something in it is none of the above; the message names its place.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_packed(state, tensors, ""), allow_nan=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={KEY: text})


def load(file: Path) -> Any:
    """Return a state that `save` wrote; its tensors are on the CPU.

    Raises:
        ValueError, KeyError, safetensors.SafetensorError: it is no such file.
    """
    with safe_open(file, "pt") as saved:
        header = saved.metadata() or {}
        if KEY not in header:
            raise ValueError(f"{file.name} holds no state")
        names = list(saved.keys())
        return _unpacked(json.loads(header[KEY]), {name: saved.get_tensor(name) for name in names})


@contextmanager
def fitting(file: Path) -> Iterator[None]:
    """Convert errors of the body, which loads a file of a checkpoint, to `UserError`."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each optimizer, schedule and generator has errors of its own
        if is_full(error):
            raise
        said = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"training.resume: {file} does not fit this run ({type(error).__name__}: {said[:200]}). Expected a "
            "checkpoint as this run wrote it: remove it to go on from the one before, or start anew with "
            "training.resume=never"
        ) from error


def check_form(found: Any, like: Any, place: str = "it") -> None:
    """Raise `ValueError` unless a state has the form of another one: the same kinds of values, lengths and shapes.

    Args:
        found: the state. Of a mapping those keys are compared that both have.
        like: of the same object as it is now; where it holds None, anything may be.
        place: of the state, for messages.
    """
    if like is None:
        return
    if isinstance(like, Mapping):
        if not isinstance(found, Mapping):
            raise ValueError(f"{place} is {found!r:.80}, expected a mapping")
        for key in found.keys() & like.keys():
            check_form(found[key], like[key], f"{place}.{key}")
    elif isinstance(like, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(like):
            raise ValueError(f"{place} is {found!r:.80}, expected a list of {len(like)}")
        for number, (item, value) in enumerate(zip(found, like, strict=True)):
            check_form(item, value, f"{place}[{number}]")
    elif isinstance(like, Tensor):
        if not isinstance(found, Tensor) or found.shape != like.shape:
            raise ValueError(f"{place} is {found!r:.80}, expected a tensor of {list(like.shape)}")
    elif isinstance(like, (int, float)) and not isinstance(like, bool):
        if isinstance(found, bool) or not isinstance(found, (int, float, Tensor)):
            raise ValueError(f"{place} is {found!r:.80}, expected a number")
    elif not isinstance(found, type(like)):
        raise ValueError(f"{place} is {found!r:.80}, expected {type(like).__name__}")


def _packed(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        return {"tensor": _keep(_alone(value, tensors), tensors)}
    if isinstance(value, (np.ndarray, np.generic)):
        kind = "array" if isinstance(value, np.ndarray) else "number"
        return {kind: _keep(torch.from_numpy(np.array(value, order="C")), tensors)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, tuple):
        return {"tuple": [_packed(item, tensors, f"{place}[{n}]") for n, item in enumerate(value)]}
    if isinstance(value, list):
        return [_packed(item, tensors, f"{place}[{n}]") for n, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {
            "dict": [
                [_packed(k, tensors, place), _packed(v, tensors, f"{place}.{k}")] for k, v in value.items()
            ]
        }
    if isinstance(value, (str, int, float)):  # an enumeration's value
        return _packed(
            next(kind(value) for kind in (str, int, float) if isinstance(value, kind)), tensors, place
        )
    raise TypeError(
        f"{place.lstrip('.') or 'the state'} is of type {type(value).__name__}, which is not stored"
    )


def _alone(tensor: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return a tensor on the CPU whose memory is its own, which the format asks for: a copy only where it is not."""
    made = tensor.detach().cpu().contiguous()
    shared = made.untyped_storage().nbytes() != made.nbytes
    return made.clone() if shared or any(made.data_ptr() == t.data_ptr() for t in tensors.values()) else made


def _keep(tensor: Tensor, tensors: dict[str, Tensor]) -> str:
    name = str(len(tensors))
    tensors[name] = tensor
    return name


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "dict":
        return {_unpacked(k, tensors): _unpacked(v, tensors) for k, v in held}
    if kind == "tuple":
        return tuple(_unpacked(item, tensors) for item in held)
    if kind == "float":
        return float(held)
    if kind == "dtype":
        return getattr(torch, held) if isinstance(getattr(torch, held, None), torch.dtype) else None
    if kind in ("array", "number"):
        array = tensors[held].numpy()
        return array if kind == "array" else array[()]
    if kind == "tensor":
        return tensors[held]
    raise ValueError(f"a state holds a {kind}, which this version does not know")
