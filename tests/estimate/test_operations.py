"""Multiply-adds against torch's own counter, which sees every product of matrices that a forward pass makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from camex_ft.estimate.operations import Operations, operations
from camex_ft.estimate.survey import survey
from camex_ft.upcycling import expert_layers, upcycle
from tests.helpers.estimate_sizes import CASES, CLASSIFIER, LENGTH, ROWS, SEGMENT, batch, inputs, small


def in_place(total: Any, left: list[int], right: list[int], **_: Any) -> int:
    """Operations of `baddbmm_`, curvature's product, which torch's counter does not know."""
    batches, rows, inner = left
    return 2 * batches * rows * inner * right[-1]


def counted(model: Any, head: str) -> float:
    """Multiply-adds of one forward pass. torch counts two operations for each."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place}) as counter:
        model(**inputs(head))
    return counter.get_total_flops() / 2


def planned(dense: Any, model: Any) -> Operations:
    return operations(survey(dense, batch(dense)), expert_layers(model))


@pytest.mark.parametrize(("model_type", "head"), CASES)
def test_a_dense_model(model_type: str, head: str) -> None:
    """To the last one. torch's counter does not know the CPU's fused attention, so that it is written out here."""
    model = small(model_type, head, attention="eager")
    assert planned(model, model).total * ROWS * LENGTH == counted(model, head)


@pytest.mark.parametrize(
    ("model_type", "head", "protocol"),
    [
        ("t5", CLASSIFIER, "ep-camex"),
        ("t5", "seq2seq-lm", "smear"),
        ("llama", "causal-lm", "domain"),
        ("llama", "causal-lm", "domain-ca"),
    ],
)
def test_a_merged_model(model_type: str, head: str, protocol: str) -> None:
    dense = small(model_type, head, attention="eager")
    merging = {"protocol": protocol, "experts": 4, "curvature": {"rank": 2}}
    model = upcycle(dense, merging=merging, routing={"segment": SEGMENT}).train()
    found = planned(dense, model)
    sums = found.chain * ROWS * LENGTH  # over experts: no products of matrices
    assert found.total * ROWS * LENGTH == counted(model, head) + sums


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_mixture(top_k: int) -> None:
    dense = small("bert", CLASSIFIER, attention="eager")
    model = upcycle(dense, merging={"protocol": "smoe", "experts": 4, "top_k": top_k}).train()
    assert planned(dense, model).total * ROWS * LENGTH == counted(model, CLASSIFIER)


@pytest.mark.parametrize(("protocol", "maps"), [("domain", 3), ("smear", 2)])
def test_single_tokens_meet_the_base_expert_and_k_experts(protocol: str, maps: int) -> None:
    dense = small("bert", CLASSIFIER)
    merging = {"protocol": protocol, "experts": 4, "top_k": 2}
    model = upcycle(dense, merging=merging, routing={"granularity": "token"})
    found, alone = planned(dense, model), planned(dense, dense)
    assert found.maps == maps * alone.maps
    assert found.merging == 0
    assert found.outside == alone.outside


@pytest.mark.parametrize(("protocol", "top_k"), [("domain", None), ("smoe", 2)])
def test_experts_of_low_rank(protocol: str, top_k: int | None) -> None:
    """Without LoRA on attention, which is not counted."""
    dense = small("llama", "causal-lm", attention="eager")
    merging = {"protocol": protocol, "experts": 4, "top_k": top_k}
    tuning = {"mode": "lora", "lora": {"rank": 4, "attention": False}}
    model = upcycle(dense, merging=merging, tuning=tuning, routing={"segment": SEGMENT}).train()
    assert planned(dense, model).total * ROWS * LENGTH == counted(model, "causal-lm")
