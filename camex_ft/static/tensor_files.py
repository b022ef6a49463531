"""Tensors by name, read one by one from safetensors files or a model, and written one by one to a new folder.

A reader holds no tensor. The writer needs names, dtypes and shapes beforehand, which its files begin with, and then
never more than one tensor, or a block of rows of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from camex_ft.backbones.source import INDEX, WEIGHTS, weight_files
from camex_ft.utils.errors import UserError

# The format's names of the dtypes that are read and written.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD = 5_000_000_000  # bytes of tensors in one file
ALIGNMENT = 8  # of the data in a file


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that is not in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.entries * self.dtype.itemsize


class TensorReader(Protocol):
    """Tensors by name."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of each tensor."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows."""


@dataclass(frozen=True)
class FolderReader:
    """Tensors of a folder's safetensors files. A file is open only while a tensor is read, so no pages stay mapped."""

    folder: Path
    infos: Mapping[str, TensorInfo] = field(init=False)
    _files: Mapping[str, Path] = field(init=False)

    def __post_init__(self) -> None:
        infos, files = {}, {}
        for file in weight_files(self.folder):
            with safe_open(self.folder / file, framework="pt") as tensors:
                for name in sorted(tensors.keys()):
                    part = tensors.get_slice(name)
                    infos[name] = TensorInfo(
                        tuple(part.get_shape()), _dtype(part.get_dtype(), name, self.folder)
                    )
                    files[name] = self.folder / file
        object.__setattr__(self, "infos", infos)
        object.__setattr__(self, "_files", files)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows."""
        with safe_open(self._files[name], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name) if rows is None else tensors.get_slice(name)[rows]
            return tensor


@dataclass(frozen=True)
class ModelReader:
    """Parameters and saved buffers of a model in memory; tied ones once, under their first name."""

    model: PreTrainedModel
    infos: Mapping[str, TensorInfo] = field(init=False)

    def __post_init__(self) -> None:
        saved = self.model.state_dict().keys()
        own = [*self.model.named_parameters(), *self.model.named_buffers()]
        infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in own if name in saved}
        object.__setattr__(self, "infos", infos)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows, on the CPU."""
        module, _, last = name.rpartition(".")
        tensor: Tensor = getattr(self.model.get_submodule(module), last).detach()
        return (tensor if rows is None else tensor[rows]).cpu()


def _dtype(name: str, tensor: str, folder: Path) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"{folder}: {tensor} has the dtype {name}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def write_tensors(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    blocks: Callable[[str], Iterable[Tensor]],
    *,
    shard: int = SHARD,
) -> None:
    """Write tensors to a folder as transformers names the files: one, or several of at most `shard` bytes each.

    Args:
        folder: it exists.
        infos: names in order, shapes and dtypes.
        blocks: name -> the tensor's blocks of rows, in order.
        shard: bytes; a larger tensor has a file of its own.
    """
    shards = [
        sorted(names, key=lambda n: -infos[n].dtype.itemsize) for names in _shards(infos, shard)
    ]  # aligned
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(names, file)
        with (folder / file).open("wb") as target:
            _write_header(target, {name: infos[name] for name in names})
            for name in names:
                _write_blocks(target, infos[name], blocks(name))
    if len(shards) > 1:
        total = sum(info.nbytes for info in infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(infos: Mapping[str, TensorInfo], most: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, info in infos.items():
        if names and size + info.nbytes > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += info.nbytes
    yield names


def _write_header(target: BinaryIO, infos: Mapping[str, TensorInfo]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in infos.items():
        end = offset + info.nbytes
        header[name] = {"dtype": NAMES[info.dtype], "shape": info.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    target.write(len(text).to_bytes(8, "little") + text)


def _write_blocks(target: BinaryIO, info: TensorInfo, blocks: Iterable[Tensor]) -> None:
    size = 0
    for block in blocks:
        data = block.to(info.dtype).contiguous().flatten().view(torch.uint8).numpy()
        target.write(data.data)
        size += data.nbytes
    if size != info.nbytes:
        raise ValueError(f"blocks of {size:,} bytes for a tensor of {info.nbytes:,}")
