"""The header of a GGUF file, read without its weights: what a writer wrote, and every way in which it can be broken."""

import contextlib
import random

import pytest

from camex_ft.config import gguf as header
from camex_ft.utils.errors import UserError

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
np = pytest.importorskip("numpy")


@pytest.fixture
def path(tmp_path):
    """A file with a value of every kind, an array of each, and tensors of three types."""
    path = tmp_path / "mixed.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for width in (8, 16, 32, 64):
        getattr(writer, f"add_uint{width}")(f"u{width}", 2**width - 1)
        getattr(writer, f"add_int{width}")(f"i{width}", -(2 ** (width - 1)))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("truth", True)
    writer.add_string("name", "Über")
    writer.add_array("texts", ["a", "bc", ""])
    writer.add_array("numbers", [1, 2, 3, 4])
    writer.add_tensor("plain", np.ones((2, 3), dtype=np.float32))
    writer.add_tensor("half", np.ones(5, dtype=np.float16))
    blocks = gguf.quants.quantize(np.ones((2, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_was_written_is_read(path):
    found = header.read_header(path)
    assert (found.architecture, found.model_type) == ("llama", "llama")
    for width in (8, 16, 32, 64):
        assert found.values[f"u{width}"] == 2**width - 1
        assert found.values[f"i{width}"] == -(2 ** (width - 1))
    assert [found.values[key] for key in ("f32", "f64", "truth", "name")] == [0.5, 0.1, True, "Über"]
    assert [found.values[key] for key in ("texts", "numbers")] == [3, 4]  # of arrays, their length
    assert [(t.name, t.shape, t.type) for t in found.tensors] == [
        ("plain", (3, 2), 0),
        ("half", (5,), 1),
        ("blocks", (64, 2), 3),
    ]
    reader = gguf.GGUFReader(path)
    assert [found.start + t.offset for t in found.tensors] == [t.data_offset for t in reader.tensors]


def test_sizes_of_tensors_are_those_of_the_format():
    """Types that a later version of the format adds are refused by name until they are in the table."""
    due = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: due[kind] for kind in header.BLOCKS} == header.BLOCKS


def test_every_truncation_is_found(path):
    """Wherever the file is cut: the last byte that counts is the last tensor's, before what fills up its block."""
    whole = path.read_bytes()
    found = header.read_header(path)
    last = found.start + found.tensors[-1].offset + 4 * 20
    assert last <= len(whole) < last + header.ALIGNMENT
    for cut in range(last):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"corrupt or truncated|is no GGUF file|GGUF version 0"):
            header.read_header(path)


def test_a_corrupt_header_is_refused_or_read_and_never_anything_else(path):
    whole = path.read_bytes()
    start = header.read_header(path).start
    random.seed(0)
    for _ in range(2000):
        broken = bytearray(whole)
        for place in random.sample(range(start), 3):
            broken[place] = random.randrange(256)
        path.write_bytes(broken)
        with contextlib.suppress(UserError):
            header.read_header(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"GGML" + data[4:], "is no GGUF file: it does not begin with GGUF"),
        (lambda data: data[:4] + bytes([1, 0, 0, 0]) + data[8:], "is GGUF version 1; expected 2 or 3"),
        (lambda data: data[:4] + bytes([0, 0, 0, 3]) + data[8:], "expected 2 or 3, little-endian"),
        (lambda data: b"", "is no GGUF file"),
        (lambda data: data.replace(b"llama", b"llam\xff"), ""),
    ],
)
def test_other_files(path, change, message):
    path.write_bytes(change(path.read_bytes()))
    if message:
        with pytest.raises(UserError, match=message):
            header.read_header(path)
    else:
        assert header.read_header(path).architecture == "llam\ufffd"


def test_a_folder_and_a_file_that_is_not_there(tmp_path):
    for name in (".", "none.gguf"):
        with pytest.raises(UserError, match="cannot be read"):
            header.read_header(tmp_path / name)
