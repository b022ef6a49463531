"""Invariant 8, first half: what is saved and loaded again gives the same logits, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from camex_ft.upcycling import expert_layers, load
from tests.helpers.invariant_cases import Case, cases, mixture_cases, output, shake, upcycled
from tests.helpers.tiny import inputs_of


@pytest.mark.parametrize("case", [*cases(), *mixture_cases()], ids=str)
def test_saved_model_gives_the_same_logits(case: Case, tmp_path: Path) -> None:
    model = shake(upcycled(case))
    inputs = inputs_of(model, case.head)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is type(model) and type(loaded.config) is type(model.config)
    assert list(expert_layers(loaded)) == list(expert_layers(model))
    with torch.no_grad():
        assert torch.equal(output(loaded, inputs), output(model, inputs))
