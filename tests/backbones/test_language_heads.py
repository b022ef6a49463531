"""Language-modelling heads after upcycling, saving and loading: tied embeddings and how to generate stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import camex_ft
from camex_ft.backbones.heads import HEADS
from camex_ft.upcycling import plain_class
from tests.helpers.tiny import heads_of, inputs_of, model_types

LANGUAGE = [(t, head) for t in model_types() for head in ("causal-lm", "seq2seq-lm") if head in heads_of(t)]
MERGING = {"protocol": "ties-ca", "experts": 2, "curvature": {"rank": 1}}


def ends(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


@pytest.mark.parametrize(("kind", "head"), LANGUAGE)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_loaded_under_its_own_class(
    kind: str, head: str, tied: bool, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    dense = tiny(kind, head, tie_word_embeddings=tied)
    if not tied:  # T5's configurations always say tied; its checkpoints decide, by holding both
        dense.get_output_embeddings().weight = torch.nn.Parameter(torch.randn_like(ends(dense)[1]))
    dense.generation_config.update(max_new_tokens=5, num_beams=2, eos_token_id=[1, 7])
    model = camex_ft.upcycle(dense, merging=MERGING)
    model.save_pretrained(tmp_path)
    loaded = camex_ft.load(tmp_path)
    assert type(loaded).__name__ == f"Camex{type(dense).__name__}"
    assert plain_class(type(loaded)) is HEADS[head]._model_mapping[type(dense.config)]
    assert [(a is b) for a, b in (ends(dense), ends(model), ends(loaded))] == [tied] * 3
    shapes = [weight.shape for weight in load_file(tmp_path / "model.safetensors").values()]
    assert shapes.count(ends(dense)[0].shape) == (1 if tied else 2)
    assert loaded.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    assert loaded.generation_config.eos_token_id == [1, 7]
    inputs = inputs_of(dense, head)
    with torch.no_grad():
        # float32, three layers: merging copies of one layer rounds anew
        torch.testing.assert_close(loaded(**inputs).logits, dense(**inputs).logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
