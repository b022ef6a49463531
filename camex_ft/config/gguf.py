"""The header of a GGUF file, read and checked without its weights.

    "GGUF", version, counts | keys and values | name, shape, type and offset of each tensor | the tensors' bytes

The package `gguf` is not used: it is optional, decodes every string of a vocabulary (16 s for 150,000 tokens, 0.3 s
here), and raises errors of many types for files that are cut short.

Source: the format's specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from camex_ft.utils.errors import UserError, nearest
from camex_ft.utils.registry import families

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
ALIGNMENT = 32
# By the number of values in a block: type of tensor to the bytes that a block takes.
SIZES = {
    1: {0: 4, 1: 2, 24: 1, 25: 2, 26: 4, 27: 8, 28: 8, 30: 2},
    32: {2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 9: 40, 20: 18, 39: 17},
    64: {40: 36},
    128: {41: 18},
    256: dict(zip(range(10, 20), (84, 110, 144, 176, 210, 292, 66, 74, 98, 50), strict=True))
    | {21: 110, 22: 82, 23: 136, 29: 56, 34: 54, 35: 66},
}
BLOCKS = {kind: (values, size) for values, sizes in SIZES.items() for kind, size in sizes.items()}
# Where transformers' name of the type is not the file's architecture with underscores.
MODEL_TYPES = {"t5encoder": "t5", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file; `offset` counts from where the tensors begin, `shape` has its fastest axis first."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """Header of a GGUF file.

    Attributes:
        values: its keys and values; of an array, how many elements it has.
        tensors: its tensors, in the order of the file.
        start: byte at which the tensors begin.
    """

    values: dict[str, Any]
    tensors: tuple[Tensor, ...]
    start: int

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", ""))

    @property
    def model_type(self) -> str:
        """`config.model_type` of the model that it holds."""
        return MODEL_TYPES.get(self.architecture, self.architecture.replace("-", "_"))


@dataclass
class _Cursor:
    data: mmap.mmap
    at: int = field(default=0)

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def skip(self, count: int) -> int:
        """Move on by `count` bytes; return where they began."""
        begin, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise ValueError("it ends within its header")
        return begin

    def string(self) -> str:
        begin = self.skip(self.take("Q"))
        return self.data[begin : self.at].decode("utf-8", "replace")

    def value(self) -> Any:
        kind = self.take("I")
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.take(_scalar(kind))
        of, count = self.take("I"), self.take("Q")
        if of != STRING:
            self.skip(count * struct.calcsize("<" + _scalar(of)))
            return count
        for _ in range(count):
            self.skip(self.take("Q"))
        return count

    def tensor(self) -> Tensor:
        name, axes = self.string(), self.take("I")
        shape = tuple(self.take("Q") for _ in range(axes))
        return Tensor(name, shape, self.take("I"), self.take("Q"))


def read_header(path: Path) -> Header:
    """Return the header of a GGUF file, which is read through a map of the file: its weights are not touched.

    Raises:
        UserError: it is no GGUF file, of a version or in parts that are not read here, truncated or corrupt.
    """
    again = "Copy or download it again"
    try:
        with path.open("rb") as file:
            magic, version = file.read(4), file.read(4)
            if magic != MAGIC:
                raise UserError(f"{path.name} is no GGUF file: it does not begin with GGUF. {again}")
            number = int.from_bytes(version, "little")
            if number not in VERSIONS:
                raise UserError(
                    f"{path.name} is GGUF version {number}; expected 2 or 3, little-endian: convert it anew"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _parse(_Cursor(data, 8))
                _check_extent(header, len(data))
    except OSError as error:
        raise UserError(f"{path.name} cannot be read: {error.strerror or error}") from error
    except (ValueError, struct.error, OverflowError) as error:
        raise UserError(f"{path.name} is corrupt or truncated ({error}). {again}") from error
    return header


def _parse(cursor: _Cursor) -> Header:
    tensors, keys = cursor.take("Q"), cursor.take("Q")
    values = {}
    for _ in range(keys):
        name = cursor.string()
        values[name] = cursor.value()
    tensor_infos = tuple(cursor.tensor() for _ in range(tensors))
    alignment = values.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"an alignment of {alignment}")
    return Header(values, tensor_infos, -(-cursor.at // alignment) * alignment)


def _scalar(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"a value of the unknown type {kind}")
    return SCALARS[kind]


def _check_extent(header: Header, size: int) -> None:
    """Raise `ValueError` unless every tensor lies inside the file."""
    for tensor in header.tensors:
        if tensor.type not in BLOCKS:
            raise ValueError(
                f"the tensor {tensor.name} is stored in a form that is not known, type {tensor.type}"
            )
        values, taken = BLOCKS[tensor.type]
        end = header.start + tensor.offset + math.prod(tensor.shape) // values * taken
        if end > size:
            raise ValueError(f"the tensor {tensor.name} ends at byte {end} of {size}")


def check(path: Path) -> Header:
    """Read the header of a GGUF backbone and check it.

    Raises:
        UserError: what `read_header` refuses; the package `gguf` is missing; no family serves the architecture; the
            file has no tokenizer, is one part of several, or scales its rotary positions.
    """
    header = read_header(path)
    for fault in _faults(header, path.name):
        raise UserError(fault)
    return header


def _faults(header: Header, name: str) -> Iterator[str]:
    parts = header.values.get("split.count", 1)
    if parts != 1:
        yield f"{name} is one of {parts} parts; join them first: llama-gguf-split --merge {name} WHOLE.gguf"
    if not header.architecture:
        yield f"{name} names no architecture (general.architecture), so it holds no model"
    known = sorted(families())
    if header.model_type not in known:
        hint = nearest(header.model_type, known)
        yield (
            f"{name} holds a model of the architecture '{header.architecture}', which no backbone family serves."
            f"{hint} Known types: {', '.join(known)}"
        )
    if not header.values.get("tokenizer.ggml.tokens"):
        yield f"{name} has no tokenizer in it (tokenizer.ggml.tokens): expected a file with weights and vocabulary"
    # transformers reads neither of them from a GGUF file: the model would load, and compute something else.
    scaled = [tensor.name for tensor in header.tensors if tensor.name.startswith("rope_freqs")]
    if scaled or header.values.get(f"{header.architecture}.rope.scaling.type", "none") != "none":
        yield (
            f"{name} scales its rotary positions, which transformers does not read from GGUF files: "
            "expected the same model as a folder with safetensors weights"
        )
    if importlib.util.find_spec("gguf") is None:
        yield f"{name} needs the package gguf to be read: pip install gguf"
