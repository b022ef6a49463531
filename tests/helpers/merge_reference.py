"""The published formulas of static merging in float64, on whole tensors, and donors to merge."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camex_ft import synthetic


def weighted(tensors: Tensor, weights: Sequence[float]) -> Tensor:
    return torch.stack([w * tensor for w, tensor in zip(weights, tensors, strict=True)])


def average(start: Tensor, donors: Tensor, weights: Sequence[float]) -> Tensor:
    return weighted(donors, weights).sum(0) / sum(weights)


def arithmetic(start: Tensor, donors: Tensor, weights: Sequence[float], scale: float = 1.0) -> Tensor:
    return start + scale * weighted(donors - start, weights).sum(0)


def trimmed(tau: Tensor, density: float) -> Tensor:
    """The largest magnitudes of one task vector; ties at the threshold all stay."""
    count = max(1, int(density * tau.numel()))
    least = tau.abs().flatten().sort(descending=True).values[count - 1]
    return torch.where(tau.abs() >= least, tau, 0)


def disjoint(tau: Tensor, weights: Sequence[float], elect: str, divide: str) -> Tensor:
    """The positive and the negative entries apart, and of these the elected ones."""
    terms = weighted(tau, weights)
    voters = terms if elect == "weighted" else tau
    ones = weighted(torch.ones_like(tau), weights)
    sides = []
    for side in (voters > 0, voters < 0):
        divisors = {
            "count": side.sum(0).double(),
            "weights": (ones * side).sum(0),
            "none": torch.ones_like(tau[0]),
        }
        divisor = divisors[divide]
        sides.append((terms * side).sum(0) / torch.where(divisor.abs() < 1e-8, 1, divisor))
    return torch.where(voters.sum(0) >= 0, *sides)


def ties(
    start: Tensor,
    donors: Tensor,
    weights: Sequence[float],
    density: float = 0.2,
    scale: float = 1.0,
    elect: str = "weighted",
    divide: str = "weights",
) -> Tensor:
    tau = torch.stack([trimmed(donor - start, density) for donor in donors])
    return start + scale * disjoint(tau, weights, elect, divide)


def slerp(start: Tensor, donors: Tensor, weights: Sequence[float], t: float = 0.5) -> Tensor:
    first, second = donors
    cosine = float((first * second).sum() / (first.norm() * second.norm()))
    if abs(cosine) > 0.9995:
        return (1 - t) * first + t * second
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


def fisher(
    start: Tensor, donors: Tensor, weights: Sequence[float], information: Tensor, floor: float = 1e-6
) -> Tensor:
    shares = weighted(information.clamp(min=floor), weights)
    return (shares * donors).sum(0) / shares.sum(0)


def regmean(
    start: Tensor, donors: Tensor, weights: Sequence[float], grams: Tensor, alpha: float = 0.9
) -> Tensor:
    scaled = [
        w * (alpha * g + (1 - alpha) * torch.diag(g.diag())) for w, g in zip(weights, grams, strict=True)
    ]
    products = [donor @ gram for donor, gram in zip(donors, scaled, strict=True)]
    return torch.stack(products).sum(0) @ torch.linalg.inv(torch.stack(scaled).sum(0))


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "average": average,
    "arithmetic": arithmetic,
    "ties": ties,
    "slerp": slerp,
    "fisher": fisher,
    "regmean": regmean,
}


def perturbed(model: Any, seed: int, std: float = 0.02) -> Any:
    """A donor without training: all parameters moved by noise."""
    donor = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return donor


def trained(model: Any, ids: Tensor, *, steps: int = 30, learning_rate: float = 1e-3) -> Any:
    """A donor: some steps of AdamW on windows of token ids; [windows, length]."""
    donor = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(donor.parameters(), lr=learning_rate, fused=True)
    for step in range(steps):
        batch = ids[step % len(ids)][None]
        optimizer.zero_grad()
        donor(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return donor.eval()


def save(model: Any, tokenizer: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def llamas(count: int, *, head: str = "causal-lm") -> tuple[Any, Any, list[Any]]:
    """The embedded Llama, its tokenizer and trained donors, each on tokens of its own."""
    start, tokenizer = synthetic.backbone("llama", head=head)
    donors = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(50 * seed + 3, 50 * seed + 100, (8, 32), generator=generator)
        donors.append(trained(start, ids))
    return start, tokenizer, donors


def doubles(models: Sequence[Any], name: str) -> Tensor:
    """A parameter of every model, stacked; [N, ...], float64."""
    return torch.stack([dict(model.named_parameters())[name].detach().double() for model in models])
