"""lm-evaluation-harness reads upcycled models by itself, and its scores are those of the logits."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import camex_ft
from camex_ft import synthetic

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
ROWS = 12


@pytest.fixture(scope="module")
def stories():
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install -e '.[lm-eval]'")
    spec = importlib.util.spec_from_file_location("lm_eval_stories", ROOT / "scripts" / "lm_eval_stories.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def work(stories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    stories.write_tasks(folder, rows=ROWS)
    return folder


def by_hand(model, tokenizer, work: Path) -> float:
    """exp of the mean negative log likelihood of a word, over the rows of the task."""
    total, words = 0.0, 0
    for line in (work / "stories.jsonl").read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        ids = torch.tensor(
            [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]]
        )
        with torch.no_grad():
            said = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)  # [T, V]
        total -= said.gather(1, ids[0, 1:, None]).sum().item()
        words += len(text.split())
    return math.exp(total / words)


@pytest.mark.parametrize("protocol", ["ties-ca", "ep-camex", "smoe"])
def test_scores_are_those_of_the_logits(stories, work, protocol, tmp_path):
    dense, tokenizer = synthetic.backbone("gpt2", head="causal-lm", seed=1)
    model = camex_ft.upcycle(
        dense,
        merging={"protocol": protocol, "experts": 3, "top_k": 2 if protocol == "smoe" else None},
        routing={"segment": 16},
    )
    with torch.no_grad():
        for parameter in model.parameters():  # so that experts differ, and something depends on routing
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scored = stories.score(str(tmp_path), work)
    loaded = camex_ft.load(tmp_path)
    # the harness pads rows to a batch, and adds up in float32
    assert scored["stories word_perplexity"] == pytest.approx(by_hand(loaded, tokenizer, work), rel=1e-4)
    assert 0 <= scored["endings acc"] <= 1
