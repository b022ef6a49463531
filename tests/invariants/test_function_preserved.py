"""Invariant 1: before any training, the upcycled model computes what the dense model computes."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.invariant_cases import Case, cases, dense, output, upcycled
from tests.helpers.tiny import inputs_of

# the merged weights are sums of products that round: about 1e-7 relative on logits of about 1
TOLERANCE = 1e-5


@pytest.mark.parametrize("case", cases(), ids=str)
def test_logits_are_those_of_the_dense_model(case: Case) -> None:
    original = dense(case.model_type, case.head)
    before = {name: p.clone() for name, p in original.state_dict().items()}
    inputs = inputs_of(original, case.head)
    with torch.no_grad():
        expected = output(original, inputs)
        actual = output(upcycled(case), inputs)
    scale = float(expected.abs().max())  # the tiny models' random weights are large, so their logits may be
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * max(1.0, scale))
    for name, value in original.state_dict().items():
        assert torch.equal(value, before[name]), f"upcycling changed {name} of the dense model"
