"""Every method against its formula in float64, against PEFT's and mergekit's, and what holds for all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor

from camex_ft.static.methods.means import average, fisher, regmean, slerp
from camex_ft.static.methods.task_vectors import (
    arithmetic,
    dare,
    dare_ties,
    disjoint_sum,
    dropped,
    magnitude_threshold,
    ties,
)
from camex_ft.utils.registry import MERGE_METHODS
from tests.helpers import merge_reference as reference

# Float32 against float64: entries of some units, sums of a few terms.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}

densities = st.sampled_from([0.05, 0.2, 0.5, 0.9, 1.0])
scales = st.sampled_from([0.3, 1.0, 1.5])
seeds = st.integers(0, 2**16)


def tensors(seed: int, count: int, shape: tuple[int, ...] = (5, 7)) -> tuple[Tensor, Tensor]:
    """A start and donors, with entries that some donors share with it."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=generator)
    tau = 0.3 * torch.randn((count, *shape), generator=generator)
    tau[torch.rand(tau.shape, generator=generator) < 0.2] = 0
    return start, start + tau


@st.composite
def weight_lists(draw: Any) -> list[float]:
    count = draw(st.integers(1, 4))
    return [draw(st.sampled_from([0.25, 0.5, 1.0, 2.0])) for _ in range(count)]


def thresholds(tau: Tensor, density: float) -> Tensor:
    return torch.stack([magnitude_threshold(each, density=density) for each in tau])


@given(seed=seeds, weights=weight_lists())
@settings(deadline=None, max_examples=30)
def test_average_is_its_formula(seed: int, weights: list[float]) -> None:
    start, donors = tensors(seed, len(weights))
    expected = reference.average(start.double(), donors.double(), weights)
    torch.testing.assert_close(average(donors, weights=torch.tensor(weights)).double(), expected, **CLOSE)


@given(seed=seeds, weights=weight_lists(), scale=scales)
@settings(deadline=None, max_examples=30)
def test_arithmetic_is_its_formula_and_pefts(seed: int, weights: list[float], scale: float) -> None:
    start, donors = tensors(seed, len(weights))
    tau = donors - start
    merged = arithmetic(start, tau, weights=torch.tensor(weights), scale=scale)
    expected = reference.arithmetic(start.double(), donors.double(), weights, scale)
    torch.testing.assert_close(merged.double(), expected, **CLOSE)
    theirs = merge_utils.task_arithmetic(list(tau), scale * torch.tensor(weights))
    torch.testing.assert_close(merged, start + theirs, **CLOSE)


@given(
    seed=seeds,
    weights=weight_lists(),
    density=densities,
    scale=scales,
    elect=st.sampled_from(["weighted", "unweighted"]),
    divide=st.sampled_from(["weights", "count", "none"]),
)
@settings(deadline=None, max_examples=60)
def test_ties_is_its_formula(
    seed: int, weights: list[float], density: float, scale: float, elect: Any, divide: Any
) -> None:
    start, donors = tensors(seed, len(weights))
    tau = donors - start
    merged = ties(
        start,
        tau,
        weights=torch.tensor(weights),
        thresholds=thresholds(tau, density),
        scale=scale,
        elect=elect,
        divide=divide,
    )
    # the same task vectors, whose float32 rounding would decide ties of magnitudes and signs
    trimmed = torch.stack([reference.trimmed(each, density) for each in tau.double()])
    expected = start.double() + scale * reference.disjoint(trimmed, weights, elect, divide)
    torch.testing.assert_close(merged.double(), expected, **CLOSE)


@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 1.0])
def test_ties_is_pefts_under_its_convention(density: float) -> None:
    start, donors = tensors(3, 3, (40, 30))
    tau, weights = donors - start, torch.tensor([1.0, 0.5, 2.0])
    mine = ties(
        start, tau, weights=weights, thresholds=thresholds(tau, density), elect="unweighted", divide="count"
    )
    torch.testing.assert_close(mine, start + merge_utils.ties(list(tau), weights, density), **CLOSE)


def test_equal_weights_make_the_conventions_one() -> None:
    start, donors = tensors(4, 3, (40, 30))
    tau, weights = donors - start, torch.ones(3)
    numbers = thresholds(tau, 0.2)
    merged = [
        ties(start, tau, weights=weights, thresholds=numbers, elect=elect, divide=divide)
        for elect, divide in (("weighted", "weights"), ("unweighted", "count"))
    ]
    torch.testing.assert_close(merged[0], merged[1], rtol=0, atol=0)


@pytest.mark.parametrize("density", [0.1, 0.3, 1.0])
def test_trimming_alone_is_pefts_magnitude_prune(density: float) -> None:
    _, donors = tensors(5, 3, (20, 30))
    weights = torch.tensor([1.0, 0.5, 2.0])
    keep = [torch.where(d.abs() >= magnitude_threshold(d, density=density), d, 0) for d in donors]
    mine = sum(w * k for w, k in zip(weights, keep, strict=True))
    torch.testing.assert_close(mine, merge_utils.magnitude_prune(list(donors), weights, density), **CLOSE)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("density", [0.1, 0.7, 1.0])
def test_dare_and_dare_ties_are_their_formulas_for_the_same_draw(density: float) -> None:
    start, donors = tensors(6, 3)
    tau, weights = donors - start, [1.0, 0.5, 2.0]
    draw = dropped(tau, density=density, generator=generator())
    mask = draw != 0
    assert torch.all(mask <= (tau != 0))
    kept = tau.double() * mask / density
    arguments: dict[str, Any] = {
        "weights": torch.tensor(weights),
        "generator": generator(),
        "density": density,
        "scale": 0.7,
    }
    expected = start.double() + 0.7 * reference.weighted(kept, weights).sum(0)
    torch.testing.assert_close(dare(start, tau, **arguments).double(), expected, **CLOSE)
    arguments["generator"] = generator()
    expected = start.double() + 0.7 * reference.disjoint(kept, weights, "weighted", "none")
    torch.testing.assert_close(dare_ties(start, tau, **arguments).double(), expected, **CLOSE)


def test_dare_drops_the_share_that_it_says_and_its_mean_is_task_arithmetic() -> None:
    tau = torch.ones(1, 400, 500)
    draw = dropped(tau, density=0.3, generator=generator())
    kept = float((draw != 0).float().mean())
    spread = math.sqrt(0.3 * 0.7 / tau.numel())
    assert abs(kept - 0.3) < 5 * spread
    assert abs(float(draw.mean()) - 1) < 5 * spread / 0.3


@pytest.mark.parametrize("elect", ["unweighted"])
def test_dare_ties_is_pefts_for_the_same_draw(elect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start, donors = tensors(7, 3, (20, 30))
    tau, weights = donors - start, torch.tensor([1.0, 0.5, 2.0])
    draws = iter(dropped(torch.ones_like(tau), density=0.4, generator=generator()))
    monkeypatch.setattr(merge_utils, "random_pruning", lambda tensor, density, rescale: tensor * next(draws))
    theirs = merge_utils.dare_ties(list(tau), weights, 0.4)
    draws = iter(dropped(torch.ones_like(tau), density=0.4, generator=generator()))
    linear = merge_utils.dare_linear(list(tau), weights, 0.4)
    mine = dare_ties(
        start, tau, weights=weights, generator=generator(), density=0.4, elect=elect, divide="count"
    )
    torch.testing.assert_close(mine, start + theirs, **CLOSE)
    mine = dare(start, tau, weights=weights, generator=generator(), density=0.4)
    torch.testing.assert_close(mine, start + linear, **CLOSE)


@given(seed=seeds, t=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
@settings(deadline=None, max_examples=30)
def test_slerp_is_its_formula(seed: int, t: float) -> None:
    start, donors = tensors(seed, 2)
    expected = reference.slerp(start.double(), donors.double(), [], t)
    torch.testing.assert_close(slerp(donors, t=t).double(), expected, **CLOSE)


@pytest.mark.parametrize("second", [1.0, 2.0, -1.0])
def test_slerp_of_parallel_tensors_is_the_straight_line(second: float) -> None:
    start, _ = tensors(0, 1)
    donors = torch.stack([start, second * start])
    torch.testing.assert_close(slerp(donors, t=0.25), 0.75 * start + 0.25 * second * start, **CLOSE)
    assert torch.equal(slerp(torch.zeros(2, 3), t=0.5), torch.zeros(3))


def test_slerp_keeps_the_norm_of_tensors_of_one_norm() -> None:
    _, donors = tensors(8, 2)
    donors = donors / donors.flatten(1).norm(dim=1).view(2, 1, 1)
    assert float(slerp(donors, t=0.3).norm()) == pytest.approx(1, abs=1e-6)


@given(seed=seeds, weights=weight_lists())
@settings(deadline=None, max_examples=30)
def test_fisher_is_its_formula(seed: int, weights: list[float]) -> None:
    start, donors = tensors(seed, len(weights))
    information = torch.rand(donors.shape, generator=torch.Generator().manual_seed(seed)).pow(8)
    expected = reference.fisher(start.double(), donors.double(), weights, information.double())
    merged = fisher(donors, weights=torch.tensor(weights), statistic=information)
    torch.testing.assert_close(merged.double(), expected, **CLOSE)


def test_fisher_without_information_is_the_mean() -> None:
    _, donors = tensors(9, 3)
    weights = torch.tensor([1.0, 0.5, 2.0])
    merged = fisher(donors, weights=weights, statistic=torch.zeros_like(donors))
    torch.testing.assert_close(merged, average(donors, weights=weights), **CLOSE)


def grams(seed: int, count: int, width: int, tokens: int = 50) -> Tensor:
    inputs = torch.randn(count, tokens, width, generator=torch.Generator().manual_seed(seed))
    return inputs.mT @ inputs / tokens


@given(seed=seeds, weights=weight_lists(), alpha=st.sampled_from([0.1, 0.9, 1.0]))
@settings(deadline=None, max_examples=30)
def test_regmean_is_its_formula(seed: int, weights: list[float], alpha: float) -> None:
    start, donors = tensors(seed, len(weights))
    gram = grams(seed, len(weights), 7)
    expected = reference.regmean(start.double(), donors.double(), weights, gram.double(), alpha)
    merged = regmean(donors, weights=torch.tensor(weights), statistic=gram, alpha=alpha)
    torch.testing.assert_close(merged.double(), expected, **CLOSE)
    other = regmean(donors.mT, weights=torch.tensor(weights), statistic=gram, alpha=alpha, transposed=True)
    torch.testing.assert_close(other.mT, merged, **CLOSE)


def test_regmean_is_the_least_squares_fit() -> None:
    _, donors = tensors(10, 2)
    inputs = torch.randn(2, 60, 7, generator=generator()).double()
    gram = inputs.mT @ inputs / 60
    merged = regmean(donors.double(), weights=torch.ones(2), statistic=gram, alpha=1.0)
    outputs = torch.cat([x @ d.double().mT for x, d in zip(inputs, donors, strict=True)])
    expected = torch.linalg.lstsq(inputs.flatten(0, 1), outputs).solution.mT
    torch.testing.assert_close(merged, expected, rtol=1e-9, atol=1e-9)


def test_regmean_leaves_inputs_without_texts_at_the_mean() -> None:
    _, donors = tensors(11, 3)
    gram = grams(11, 3, 7)
    gram[:, :, 2] = gram[:, 2, :] = 0
    weights = torch.ones(3)
    merged = regmean(donors, weights=weights, statistic=gram)
    torch.testing.assert_close(merged[:, 2], average(donors, weights=weights)[:, 2], **CLOSE)
    mean = regmean(donors, weights=weights, statistic=None)
    torch.testing.assert_close(mean, average(donors, weights=weights), **CLOSE)


# -- mergekit, where it is installed ----------------------------------------------------------------------------------


def theirs(name: str, start: Tensor, donors: Tensor, weights: list[float], **options: Any) -> Tensor:
    """Merge one tensor with mergekit's own method."""
    module = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
    sparsify = pytest.importorskip("mergekit.sparsify")
    consensus, method = {
        "task_arithmetic": (None, None),
        "ties": (module.ConsensusMethod.sum, sparsify.SparsificationMethod.magnitude),
        "dare_linear": (None, sparsify.SparsificationMethod.random),
        "dare_ties": (module.ConsensusMethod.sum, sparsify.SparsificationMethod.random),
    }[name]
    entry = module.GeneralizedTaskArithmeticMerge(
        consensus_method=consensus,
        sparsification_method=method,
        default_normalize=name == "ties",
        default_rescale=name.startswith("dare"),
        method_name=name,
        method_pretty_name=None,
        method_reference_url=None,
    )
    group = _group(start, donors)
    numbers = range(1, len(donors) + 1)
    parameters = {
        "int8_mask": False,
        "normalize": name == "ties",
        "rescale": name.startswith("dare"),
        "lambda": options.pop("scale", 1.0),
        "weight": dict(zip(numbers, weights, strict=True)),
        "density": dict.fromkeys(numbers, options.pop("density", 1.0)),
        **options,
    }
    merged: Tensor = entry.merge_group(group, **parameters)
    return merged


def _group(start: Tensor, donors: Tensor) -> Any:
    """A group as its methods take it: a base and others, each with an id and a tensor."""
    from types import SimpleNamespace

    entries = [SimpleNamespace(id=n, tensor=tensor) for n, tensor in enumerate([start, *donors])]
    return SimpleNamespace(base=entries[0], non_base=entries[1:])


@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 1.0])
def test_ties_is_mergekits(density: float) -> None:
    start, donors = tensors(12, 3, (40, 30))
    tau, weights = donors - start, [1.0, 0.5, 2.0]
    mine = ties(start, tau, weights=torch.tensor(weights), thresholds=thresholds(tau, density), scale=0.7)
    torch.testing.assert_close(
        mine, theirs("ties", start, donors, weights, density=density, scale=0.7), **CLOSE
    )


def test_arithmetic_is_mergekits() -> None:
    start, donors = tensors(13, 3, (40, 30))
    weights = [1.0, 0.5, -2.0]
    mine = arithmetic(start, donors - start, weights=torch.tensor(weights), scale=0.7)
    torch.testing.assert_close(mine, theirs("task_arithmetic", start, donors, weights, scale=0.7), **CLOSE)


def test_dare_ties_is_mergekits_for_the_same_draw_without_its_rescaling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sparsify = pytest.importorskip("mergekit.sparsify")
    start, donors = tensors(14, 3, (40, 30))
    tau, weights = donors - start, [1.0, 0.5, 2.0]
    draws = iter(dropped(torch.ones_like(tau), density=0.4, generator=generator()))
    monkeypatch.setattr(sparsify, "bernoulli", lambda tensor, density, rescale_norm: tensor * next(draws))
    expected = theirs("dare_ties", start, donors, weights, density=0.4, rescale=False)
    mine = dare_ties(start, tau, weights=torch.tensor(weights), generator=generator(), density=0.4)
    torch.testing.assert_close(mine, expected, **CLOSE)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_mergekits(t: float) -> None:
    module = pytest.importorskip("mergekit.merge_methods.slerp")
    _, donors = tensors(15, 2)
    first, second = donors.flatten(1).unsqueeze(1)
    expected = module.slerp(torch.tensor([t]), first, second).view_as(donors[0])
    torch.testing.assert_close(slerp(donors, t=t), expected, **CLOSE)


# -- what holds for every method --------------------------------------------------------------------------------------


def arguments_of(name: str, start: Tensor, donors: Tensor) -> dict[str, Any]:
    entry = MERGE_METHODS.get(name)
    tau = donors - start
    gram = entry.statistic == "gram"
    every = {
        "start": start,
        "donors": donors,
        "tau": tau,
        "weights": torch.ones(len(donors)),
        "thresholds": thresholds(tau, 1.0),
        "generator": generator(),
        "statistic": grams(0, len(donors), start.shape[-1]) if gram else torch.rand(donors.shape),
    }
    options = {"density": 1.0} if "density" in entry.options else {}
    return {key: value for key, value in every.items() if entry.takes(key)} | options


@pytest.mark.parametrize("name", MERGE_METHODS.names())
def test_equal_donors_give_that_donor(name: str) -> None:
    entry = MERGE_METHODS.get(name)
    start, donors = tensors(16, 1)
    several = donors.expand(entry.count or 2, *start.shape).clone()
    arguments = arguments_of(name, start, several)
    if "scale" in entry.options and name != "ties":  # a sum, not a mean
        arguments["scale"] = 0.5
    merged = entry.function(**arguments)
    torch.testing.assert_close(merged, donors[0], rtol=1e-5, atol=1e-5)  # a solution of a system in regmean


@pytest.mark.parametrize("name", [n for n in MERGE_METHODS.names() if MERGE_METHODS.get(n).count is None])
def test_the_order_of_the_donors_does_not_matter(name: str) -> None:
    entry = MERGE_METHODS.get(name)
    start, donors = tensors(17, 3)
    arguments = arguments_of(name, start, donors)
    backwards = {
        key: value.flip(0) if key not in ("start", "density", "generator") else value
        for key, value in arguments.items()
    }
    if "generator" in backwards:
        backwards["generator"] = generator()
    torch.testing.assert_close(entry.function(**arguments), entry.function(**backwards), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in MERGE_METHODS.names() if MERGE_METHODS.get(n).pointwise])
def test_a_pointwise_method_merges_rows_as_it_merges_the_whole(name: str) -> None:
    entry = MERGE_METHODS.get(name)
    start, donors = tensors(18, 3)
    arguments = arguments_of(name, start, donors)
    halves = []
    for rows in (slice(0, 2), slice(2, 5)):
        part = {
            key: value[:, rows] for key, value in arguments.items() if key in ("donors", "tau", "statistic")
        }
        part |= {"start": start[rows]} if "start" in arguments else {}
        halves.append(entry.function(**{**arguments, **part}))
    assert torch.equal(torch.cat(halves), entry.function(**arguments))


@pytest.mark.parametrize("name", MERGE_METHODS.names())
def test_a_method_has_a_formula_a_convention_and_a_meaning_of_every_option(name: str) -> None:
    entry = MERGE_METHODS.get(name)
    assert "Convention: " in entry.doc
    assert entry.source
    meanings = entry.doc.partition("Args:")[2]
    assert all(option in meanings for option in entry.options)
    assert set(entry.ranges) <= set(entry.options)


def test_a_sum_of_weights_that_cancel_is_not_divided_by() -> None:
    tau = torch.ones(2, 3)
    merged = disjoint_sum(tau, torch.tensor([1.0, -1.0]), elect="unweighted", divide="weights")
    assert torch.equal(merged, torch.zeros(3))
