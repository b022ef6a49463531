"""The files that a reader of one forward pass has to open, and how often the execution moves between them.

Measured with `sys.setprofile`, for a call of an upcycled model in evaluation without gradients; embeddings, attention
and everything else outside of the package are ignored.

    file      a file of `camex_ft` in which a frame is entered
    switch    a call or a return (also of a generator) after which a frame of another file of `camex_ft` runs than
    before;
              frames of other packages and C code in between do not count, nor does the entry into the first file
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import camex_ft
from camex_ft.upcycling import upcycle
from tests.helpers.tiny import inputs_of, make

PACKAGE = f"{Path(camex_ft.__file__).parent}/"


class ReadingPath:
    """Profile function that counts files and switches."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.switches, self.stack, self.last = 0, [], ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event not in ("call", "return") or not file.startswith(PACKAGE):
            return
        if event == "call":
            self.stack.append(file)
            self.files.add(file)
        else:
            self.stack.pop()
        if self.stack:
            self.switches += bool(self.last) and self.stack[-1] != self.last
            self.last = self.stack[-1]


@torch.no_grad()
def forward(model_type: str, head: str, protocol: str, layers: list[int]) -> ReadingPath:
    """Profile the first forward pass of an upcycled model."""
    model = upcycle(
        make(model_type, head, {}),
        merging={"protocol": protocol, "experts": 3, "curvature": {"rank": 2}},
        upcycle={"layers": layers},
    ).eval()
    inputs, path = inputs_of(model, head), ReadingPath()
    sys.setprofile(path)
    try:
        model(**inputs)
    finally:
        sys.setprofile(None)
    return path


@pytest.mark.parametrize(
    ("model_type", "head", "protocol", "layers", "files", "switches"),
    [
        ("bert", "sequence-classification", "ties-ca", [1], 12, 60),
        ("gpt2", "causal-lm", "ep-camex", [0, 1], 16, 130),
    ],
)
def test_a_forward_pass_is_read_in_few_files(
    model_type: str, head: str, protocol: str, layers: list[int], files: int, switches: int
) -> None:
    path = forward(model_type, head, protocol, layers)
    assert any(file.endswith("moe/merging/functional.py") for file in path.files)
    assert len(path.files) <= files, sorted(path.files)
    assert path.switches <= switches
