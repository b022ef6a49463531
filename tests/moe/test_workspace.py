"""Working memory: the same buffer for the same name, another for another thread, none that would be held for ever."""

from __future__ import annotations

import threading

import pytest
import torch

from camex_ft.moe import workspace as module
from camex_ft.moe.workspace import workspace


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._local, "buffers", {})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_memory_is_used_again(dtype: torch.dtype) -> None:
    like = torch.empty(0, dtype=dtype)
    first = workspace("a", (4, 5), like)
    assert first.shape == (4, 5) and first.dtype == dtype and first.is_contiguous()
    smaller = workspace("a", (3, 2), like)
    assert smaller.data_ptr() == first.data_ptr()
    assert workspace("b", (4, 5), like).data_ptr() != first.data_ptr()
    assert workspace("a", (40, 50), like).shape == (40, 50)


def test_threads_do_not_meet() -> None:
    found = []
    mine = workspace("a", (8,), torch.empty(0))
    thread = threading.Thread(target=lambda: found.append(workspace("a", (8,), torch.empty(0))))
    thread.start()
    thread.join()
    assert found[0].data_ptr() != mine.data_ptr()


def test_what_is_large_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", 100)
    workspace("a", (20,), torch.empty(0))
    large = workspace("b", (20,), torch.empty(0))
    assert large.shape == (20,) and set(module._local.buffers) == {"a"}


def test_inference_mode_leaves_no_inference_tensors() -> None:
    with torch.inference_mode():
        workspace("a", (4,), torch.empty(0))
    assert not workspace("a", (4,), torch.empty(0)).is_inference()
