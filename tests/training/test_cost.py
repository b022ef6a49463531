"""What a model costs, counted by hand for BERT of 3 layers, 8 wide and 12 inside, vocabulary 40."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedModel, TrainingArguments

from camex_ft.training.cost import describe, devices, peak_memory_mb, rows_read
from camex_ft.upcycling import freeze, upcycle
from tests.helpers.invariant_cases import dense

LOOKED_UP = 40 * 8 + 32 * 8 + 2 * 8  # words, positions, types
NORM = 2 * 8
ATTENTION = 4 * (8 * 8 + 8) + NORM
FFN = (12 * 8 + 12) + (8 * 12 + 8)
BODY = LOOKED_UP + NORM + 3 * (ATTENTION + NORM) + (8 * 8 + 8)  # and the pooler
HEAD = 8 * 2 + 2
DENSE = BODY + 3 * FFN + HEAD
ROUTER = 2 * 8 * 3  # W_g and W_n
# up is 12 x 8 = (3 * 4) x (2 * 4), down 8 x 12 = (2 * 4) x (3 * 4); the bias has factors like those of `out`
CURVATURE = (9 + 16 + 4 + 16) + (9 + 16) + (4 + 16 + 9 + 16) + (4 + 16)
EXPERTS, RANK = 3, 2


def upcycled(**merging: Any) -> PreTrainedModel:
    merging = {"experts": EXPERTS, "curvature": {"rank": RANK}, **merging}
    return upcycle(dense("bert", "sequence-classification"), merging=merging)


def described(model: PreTrainedModel) -> tuple[int, int, int, int]:
    found = describe(model)
    return found["parameters"], found["trainable"], found["active"], found["flops_per_token"]


def test_dense() -> None:
    assert described(upcycled(protocol="dense")) == (DENSE, DENSE, DENSE, 2 * (DENSE - LOOKED_UP))


@pytest.mark.parametrize(
    ("protocol", "layer"),
    [
        ("smear", EXPERTS * FFN),
        ("ties", (EXPERTS + 1) * FFN),
        ("ties-ca", (EXPERTS + 1) * FFN + RANK * EXPERTS * CURVATURE),
    ],
)
@pytest.mark.parametrize("top_k", [1, 3])
def test_a_token_meets_one_merged_layer(protocol: str, layer: int, top_k: int) -> None:
    total = BODY + HEAD + 3 * (layer + ROUTER)
    active = DENSE + 3 * ROUTER
    assert described(upcycled(protocol=protocol, top_k=top_k)) == (
        total,
        total,
        active,
        2 * (active - LOOKED_UP),
    )


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_token_meets_k_experts_of_a_mixture(top_k: int) -> None:
    total = BODY + HEAD + 3 * (EXPERTS * FFN + ROUTER)
    active = BODY + HEAD + 3 * (top_k * FFN + ROUTER)
    assert described(upcycled(protocol="smoe", top_k=top_k)) == (
        total,
        total,
        active,
        2 * (active - LOOKED_UP),
    )


def test_what_is_frozen_is_not_trained() -> None:
    model = upcycled(protocol="ties")
    freeze(model, "experts")
    assert describe(model)["trainable"] == HEAD + 3 * ((EXPERTS + 1) * FFN + ROUTER)


def test_an_embedding_that_is_the_head_as_well_is_work() -> None:
    model = dense("gpt2", "causal-lm")
    assert model.lm_head.weight is model.transformer.wte.weight
    found = describe(model)
    assert found["flops_per_token"] == 2 * (found["parameters"] - model.transformer.wpe.weight.numel())


@pytest.mark.parametrize(
    ("epochs", "rows", "batch", "drop_last", "read"),
    [
        (0.0, 10, 4, False, 0),
        (1 / 3, 10, 4, False, 4),
        (1.0, 10, 4, False, 10),  # batches of 4, 4 and 2
        (4 / 3, 10, 4, False, 14),
        (3.0, 10, 4, False, 30),
        (1.5, 10, 4, True, 12),  # two batches an epoch
        (2.0, 3, 8, False, 6),
        (0.0, 0, 8, False, 0),
    ],
)
def test_rows_are_counted_as_often_as_they_are_read(epochs, rows, batch, drop_last, read) -> None:
    assert rows_read(epochs, rows, batch, drop_last=drop_last) == read


def test_the_process_uses_memory_and_counts_devices() -> None:
    assert 10 < peak_memory_mb() < 1e6  # torch alone takes more than 10 MB
    assert devices(TrainingArguments(output_dir="x", use_cpu=True)) == []
