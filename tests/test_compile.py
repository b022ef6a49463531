"""`torch.compile` of an upcycled model: the expert layers run as they are, between compiled pieces."""

from __future__ import annotations

import pytest
import torch

from camex_ft.upcycling import routing_context, upcycle
from tests.helpers.invariant_cases import dense

SLOW = pytest.mark.slow


# aot_eager goes the whole way but for generating code, which would need a compiler
@pytest.mark.parametrize(
    ("family", "protocol"),
    [("bert", "ties-ca"), pytest.param("bert", "smoe", marks=SLOW), pytest.param("t5", "dare", marks=SLOW)],
)
def test_compiled_is_the_same(family: str, protocol: str) -> None:
    model = upcycle(
        dense(family, "sequence-classification"),
        merging={"protocol": protocol, "experts": 3, "curvature": {"rank": 2}},
        routing={"noise": False},
    )
    ids = torch.tensor([[5, 6, 7, 1], [8, 9, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([0, 1])}
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        torch.manual_seed(3)
        out = run(**batch)
        context = routing_context(model)
        assert context is not None and context.last is not None and context.last.layers
        (out.loss + context.last.balance_loss()).backward()
        results.append(
            [out.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        )
    assert len(results[0]) == len(results[1])
    for found, expected in zip(*results, strict=True):
        # float32, the same operations
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
