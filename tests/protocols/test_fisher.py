"""`fisher`: weights relative to their mean, the running mean, and rows that find their own part of the statistic."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from camex_ft.moe.merging import domain_vectors as vectors
from camex_ft.moe.merging import merge_weights as merge
from camex_ft.protocols.fisher import fisher, running
from camex_ft.utils.registry import PROTOCOLS
from tests.helpers.expert_layers import merged_linear, merged_linear_reference, multiplier_of

CPU = torch.device("cpu")
INFORMATION = arrays.arrays(
    np.float64,
    st.tuples(st.integers(2, 4), st.integers(1, 6)),
    elements=st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 7.5]),
)


@given(INFORMATION, st.floats(0.01, 2.0))
@settings(deadline=None)
def test_weights_are_relative_to_their_mean(information: np.ndarray, damping: float) -> None:
    statistic = torch.from_numpy(information)
    keep = fisher(torch.zeros_like(statistic), statistic=statistic, damping=damping)
    count = len(statistic)
    torch.testing.assert_close(keep.mean(0), torch.ones_like(keep[0]), rtol=1e-12, atol=0)
    assert float(keep.min()) >= damping / (1 + damping) * (1 - 1e-12)
    assert float(keep.max()) <= (count + damping) / (1 + damping) * (1 + 1e-12)


def test_by_hand() -> None:
    keep = fisher(torch.zeros(2, 2), statistic=torch.tensor([[3.0, 0.0], [1.0, 0.0]]), damping=0.5)
    # mean 2: (3 + 1) / 3 and (1 + 1) / 3; where nothing is known, 1
    torch.testing.assert_close(keep, torch.tensor([[4 / 3, 1.0], [2 / 3, 1.0]]))
    assert fisher(torch.zeros(2, 2)) is None
    assert fisher(torch.zeros(2, 2).bfloat16(), statistic=torch.ones(2, 2)).dtype == torch.bfloat16


def test_the_running_mean() -> None:
    torch.testing.assert_close(
        running(torch.tensor([4.0]), torch.tensor([3.0]), decay=0.75), torch.tensor([5.25])
    )


@pytest.mark.parametrize("form", ["merge", "mix"])
def test_every_row_finds_its_own_statistic(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of the sliced form, in slices of 16 rows weighed 5 at a time, are those of the formula."""
    monkeypatch.setitem(merge.SLICES, "cpu", ((0, 2, 1),))
    monkeypatch.setitem(vectors.SLICE_ELEMENTS, "cpu", 5 * 3 * 6)
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    leaves = [leaf(3, 4, 6), leaf(3, 3), leaf(3, 40, 6), leaf(40, 6)]
    keep = multiplier_of(PROTOCOLS.get("fisher").bind({"damping": 0.2}), training=True, seed=0)
    keep = replace(keep, statistic=torch.rand(3, 40, 6, generator=generator, dtype=torch.float64))
    ours = merged_linear(*leaves, alpha=0.7, multiplier=keep, form=form)
    theirs = merged_linear_reference(*leaves, alpha=0.7, multiplier=keep)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    upstream = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for mine, oracle in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(theirs, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, oracle, rtol=0, atol=1e-11)  # sums of up to 240 products
