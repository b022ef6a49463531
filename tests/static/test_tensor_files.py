"""Tensors streamed to safetensors files: what the library reads back, in one file or several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from camex_ft import synthetic
from camex_ft.static.merge_inputs import row_slices
from camex_ft.static.tensor_files import DTYPES, FolderReader, ModelReader, TensorInfo, write_tensors

TENSORS = {
    "odd": torch.arange(3, dtype=torch.int8),
    "matrix": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),
    "half": torch.ones(5, 2, dtype=torch.bfloat16),
    "number": torch.tensor(2.5),
    "mask": torch.tensor([True, False]),
    "empty": torch.empty(0, 3),
}


def write(folder: Path, shard: int = 10**9) -> dict[str, TensorInfo]:
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}
    blocks = {name: [tensor] for name, tensor in TENSORS.items()}
    blocks["matrix"] = list(TENSORS["matrix"].split(4))
    write_tensors(folder, infos, blocks.__getitem__, shard=shard)
    return infos


@pytest.mark.parametrize(("shard", "files"), [(10**9, 1), (50, 3)])
def test_safetensors_reads_what_was_written(tmp_path: Path, shard: int, files: int) -> None:
    infos = write(tmp_path, shard)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(names) == files
    loaded: dict[str, Tensor] = {}
    for name in names:
        loaded |= load_file(tmp_path / name)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    reader = FolderReader(tmp_path)
    assert reader.infos == infos
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in TENSORS.items())
    assert torch.equal(reader.read("matrix", slice(2, 5)), TENSORS["matrix"][2:5])
    if files > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == TENSORS.keys()
        assert index["metadata"]["total_size"] == sum(info.nbytes for info in infos.values())


def test_blocks_that_do_not_fill_the_tensor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="blocks of 8 bytes for a tensor of 16"):
        write_tensors(tmp_path, {"a": TensorInfo((4,), torch.float32)}, lambda name: [torch.zeros(2)])


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_dtype_is_converted_to_and_read(tmp_path: Path, dtype: torch.dtype) -> None:
    write_tensors(tmp_path, {"a": TensorInfo((2, 3), dtype)}, lambda name: [torch.ones(2, 3)])
    assert torch.equal(FolderReader(tmp_path).read("a"), torch.ones(2, 3, dtype=dtype))


def test_tied_parameters_are_read_once_under_their_first_name() -> None:
    model, _ = synthetic.backbone("gpt2", head="causal-lm")
    reader = ModelReader(model)
    assert "lm_head.weight" not in reader.infos
    assert torch.equal(reader.read("transformer.wte.weight"), model.lm_head.weight)


@pytest.mark.parametrize(("shape", "count"), [((), 1), ((7,), 1), ((100,), 10), ((25, 4), 13), ((3, 50), 3)])
def test_slices_cover_all_rows_within_the_limit(shape: tuple[int, ...], count: int) -> None:
    slices = row_slices(TensorInfo(shape, torch.float32), 10)
    assert len(slices) == count
    if slices != [None]:
        rows = [row for each in slices if each is not None for row in range(each.start, each.stop)]
        assert rows == list(range(shape[0]))
