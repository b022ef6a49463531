"""Pictures and numbers of a finished run, from its record, history and model.

The singular values of a curvature M_i, a linear map on matrices [out, in], are computed from its factors:

    kronecker, rank 1    M_i = A1 (x) A2 (x) C1 (x) C2    products of the factors' singular values     exact
    diagonal             M_i = diag(D_i)                  |D_i|, entry by entry                        exact
    low-rank             M_i = (I + U V^T) (x) (I + P Q^T)    products of both sides' singular values  exact
    kronecker, rank > 1  a sum of products                Ritz values with their weights               estimated

The estimate: k steps of Golub-Kahan bidiagonalisation from a random unit vector v give a bidiagonal B. Its singular
values, each with the squared first entry of its right singular vector, are a Gauss quadrature of the distribution of
M_i's singular values, weighted by v. Vectors are not orthogonalised again: a value that returns shares its weight.
Source: Golub and Meurant, "Matrices, Moments and Quadrature" (2010), chapters 4 and 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from camex_ft.moe.curvature.base import Factors
from camex_ft.moe.curvature.diagonal import DiagonalFactors
from camex_ft.moe.curvature.low_rank import LowRankFactors
from camex_ft.moe.layers.expert_linear import ExpertLinear
from camex_ft.moe.layers.ffn import ExpertFFN, MergedFFN
from camex_ft.moe.layers.low_rank_expert_linear import LowRankLinear
from camex_ft.moe.merging.base_expert import BaseExperts, gram_matrix
from camex_ft.results import RunFolder, load_record
from camex_ft.results.entries import Result
from camex_ft.results.plots import of_inspection, of_run
from camex_ft.results.plots import series as by_layer
from camex_ft.results.record import Record, all_finite, dumps, warnings_of
from camex_ft.results.report import ReportSection, write_report
from camex_ft.run.inference import load_trained, read_run
from camex_ft.run.steps import quieten
from camex_ft.upcycling import cached, expert_layers
from camex_ft.utils.durable import write_atomically
from camex_ft.utils.folders import writing

FOLDER = "inspection"
LARGE = 1 << 16  # entries of a matrix beyond which the spectra of fewer layers are computed
LINES = 200  # of the history, in the numbers

POINTS = 41  # of a distribution
STEPS = 16
MOST = 1 << 22  # products of two sides' values
NEGLIGIBLE = 1e-12  # weight of values that come from rounding
SMALL = 1 << 18  # entries up to which an estimate is made in float64
STARTS = 4  # random vectors for small maps, of which a single one weights the values unevenly


class Similarity(NamedTuple):
    """Domain vectors of one layer: lengths [N] and cosine similarities [N, N]; NaN for a vector of length 0."""

    length: np.ndarray
    cosine: np.ndarray


@torch.no_grad()
def inspect(run_folder: Path | str, out: Path | str | None = None) -> Path:
    """Write pictures of a finished run, a page that holds them, and the numbers; return the page.

    The files are ``inspection.html`` and ``inspection.json`` in `out`, by default ``inspection/`` in the run's folder.

    Raises:
        UserError: the folder is not that of a finished run.
    """
    quieten()
    read_run(run_folder)
    folder = RunFolder(Path(run_folder))
    result = Result(record=load_record(folder.path), history=tuple(folder.read_history()))
    target = Path(out) if out else folder.own(FOLDER)
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    model: nn.Module = load_trained(run_folder)[0]
    with torch.no_grad(), cached(model):
        similarities = {name: domain_vectors(layer) for name, layer in expert_layers(model).items()}
    numbers = all_finite(_numbers(result, similarities, spectra(model)))
    record = result.record
    title = f"{record.task}: {record.protocol}, seed {record.seed}"
    choice = of_run(result, title=title)
    of_inspection(numbers, choice)
    write_atomically(target / "inspection.json", dumps(numbers) + "\n")
    notes = [f"Warning: {warning}" for warning in warnings_of(record)]
    notes += [f"{name}: left out, since {reason}" for name, reason in choice.left_out.items()]
    return write_report(
        [
            ReportSection(
                title=title, text=_summary(record, experts=bool(similarities)), command=record.run.command
            ),
            ReportSection(title="Pictures", pictures=choice.write(target, source=numbers)),
            *([ReportSection(title="Left out", notes=notes)] if notes else []),
        ],
        target / "inspection.html",
    )


def domain_vectors(layer: ExpertFFN) -> Similarity:
    """Return |tau_i| and <tau_i, tau_j> / (|tau_i| |tau_j|) of a layer's domain vectors.

    tau_i is E_i - E_m for all matrices and biases of the layer together. E_m is the base expert, stored or propagated;
    without one it is the experts' mean. For experts of low rank it is their frozen base.
    """
    bases = layer.propagated_bases() if isinstance(layer, MergedFFN) else {}
    parts = [_gram(linear, bases.get(name, linear.stored_base)) for name, linear in layer.linears.items()]
    gram = torch.stack(parts).sum(0).cpu().numpy()
    length = np.sqrt(np.clip(np.diagonal(gram), 0, None))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.clip(gram / np.outer(length, length), -1, 1)
    return Similarity(length=length, cosine=np.where(np.outer(length, length) > 0, cosine, np.nan))


def _gram(linear: ExpertLinear | LowRankLinear, bases: BaseExperts) -> Tensor:
    """Return <tau_i, tau_j> of one map, its bias's with it; [N, N], float64."""
    if isinstance(linear, LowRankLinear):
        gram = linear.gram()
    else:
        weight = linear.experts.mean(0) if bases.weight is None else bases.weight.base
        gram = gram_matrix(linear.experts, weight)
    if linear.expert_bias is not None:
        bias = linear.expert_bias.mean(0) if bases.bias is None else bases.bias.base
        gram = gram + gram_matrix(linear.expert_bias, bias)
    return gram


def spectra(model: nn.Module) -> dict[str, dict[str, Spectrum]]:
    """Return, by layer and map, the singular values of each expert's curvature, for three or four of the layers."""
    curved = {
        name: maps
        for name, layer in expert_layers(model).items()
        if (maps := {n: m for n, m in layer.linears.items() if m.curvature is not None})
    }
    large = any(m.out_features * m.in_features > LARGE for maps in curved.values() for m in maps.values())
    chosen = by_layer.some_of(list(curved), 3 if large else 4)
    return {name: {n: _spectrum(linear) for n, linear in curved[name].items()} for name in chosen}


def _spectrum(linear: ExpertLinear | LowRankLinear) -> Spectrum:
    assert linear.curvature is not None
    shape = (linear.out_features, linear.in_features)
    return spectrum(linear.curvature.factors, kind=linear.curvature.kind, shape=shape)


def _numbers(
    result: Result, similarities: Mapping[str, Similarity], spectra_of: Mapping[str, Mapping[str, Spectrum]]
) -> dict[str, Any]:
    """Return the numbers of all pictures, and the run that they belong to."""
    record = result.record
    keys = ("step", "epoch", "loss", "routing_load")
    history = [{key: line[key] for key in keys if key in line} for line in result.history]
    return {
        "run": record.run.name,
        "task": record.task,
        "protocol": record.protocol,
        "seed": record.seed,
        "per_epoch": record.metrics.per_epoch,
        "history": by_layer.some_of(history, LINES),
        **record.model_dump(mode="json", include={"routing", "curvature"}),
        "domain_vectors": {name: similarity._asdict() for name, similarity in similarities.items()},
        "spectrum": {n: {m: s._asdict() for m, s in maps.items()} for n, maps in spectra_of.items()},
    }


def _summary(record: Record, *, experts: bool) -> list[str]:
    best = record.metrics.best
    text = [
        f"{record.backbone}, {record.model.parameters:,} parameters. "
        f"Best {record.metrics.primary.replace('_', ' ')} on the validation split: "
        + ("not a number." if best is None else f"{best:.4f}.")
    ]
    if not experts:
        text.append(f"The protocol {record.protocol} has no experts, so there are only learning curves.")
    return text


# -- spectra ----------------------------------------------------------------------------------------------------------


class Spectrum(NamedTuple):
    """Singular values of each expert's map."""

    values: np.ndarray  # at evenly spaced places from the largest to the smallest; [N, POINTS]
    exact: bool  # computed from the factors, not estimated


@torch.no_grad()
def spectrum(factors: Factors, *, kind: str, shape: tuple[int, int]) -> Spectrum:
    """Return the singular values of every M_i. The kind is one of `moe.curvature.KINDS`, the shape (out, in)."""
    experts = list(_each(factors))
    if kind not in EXACT and factors.rank > 1:
        return Spectrum(np.stack([_estimated(one, shape) for one in experts]), exact=False)
    values = EXACT.get(kind, _kronecker)
    return Spectrum(np.stack([_places(values(one)) for one in experts]), exact=True)


def _each(factors: Factors) -> Iterator[Factors]:
    """Yield the factors of one expert after another; [R, 1, ...]."""
    tensors, kind = list(factors), cast(Any, type(factors))
    for i in range(tensors[0].shape[1]):
        yield kind(*(t[:, i : i + 1] for t in tensors))


def _doubles(factors: Factors) -> list[np.ndarray]:
    return [t.double().cpu().numpy() for t in factors]


def _places(values: np.ndarray) -> np.ndarray:
    """Return the values at evenly spaced places of their order, largest first; [POINTS]."""
    ordered = np.sort(values)[::-1]
    return np.interp(np.linspace(0, 1, POINTS), np.linspace(0, 1, len(ordered)), ordered)


def _products(*sides: np.ndarray) -> np.ndarray:
    """Return all products of one value of each side; if there are too many, an even selection with both ends."""
    products = np.ones(1)
    for side in sides:
        while products.size * side.size > MOST:
            if products.size >= side.size:
                products = _halved(products)
            else:
                side = _halved(side)
        products = np.outer(products, side).ravel()
    return products


def _halved(values: np.ndarray) -> np.ndarray:
    ordered = np.sort(values)
    return ordered[np.linspace(0, len(ordered) - 1, len(ordered) // 2).round().astype(int)]


def _kronecker(factors: Factors) -> np.ndarray:
    return _products(*(np.linalg.svd(f[0, 0], compute_uv=False) for f in _doubles(factors)))


def _diagonal(factors: Factors) -> np.ndarray:
    u, v = cast(DiagonalFactors, factors)
    diagonal_ = u[:, 0].double().mT @ v[:, 0].double()  # [out, in]
    return diagonal_.abs().flatten().cpu().numpy()


def _low_rank(factors: Factors) -> np.ndarray:
    u, v, p, q = (f[:, 0] for f in _doubles(cast(LowRankFactors, factors)))  # [R, k] each
    return _products(_of_side(u, v), _of_side(p, q))


def _of_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the singular values of I + left^T right, of size k, from a small matrix; left and right are [R, k].

    With an orthonormal basis Q of both, the map is the identity outside of Q and I + Q^T left^T right Q inside.
    """
    basis = np.linalg.qr(np.concatenate([left, right]).T)[0]  # [k, m]
    inside = np.eye(basis.shape[1]) + (basis.T @ left.T) @ (right @ basis)
    outside = np.ones(left.shape[1] - basis.shape[1])
    return np.concatenate([np.linalg.svd(inside, compute_uv=False), outside])


EXACT = {"diagonal": _diagonal, "low-rank": _low_rank}


def _estimated(factors: Factors, shape: tuple[int, int]) -> np.ndarray:
    """Return the values at evenly spaced places, read off the estimated distribution; [POINTS]."""
    starts = STARTS if shape[0] * shape[1] <= SMALL else 1
    quadratures = [ritz(factors, shape, seed=seed) for seed in range(starts)]
    values, weights = (np.concatenate(part) for part in zip(*quadratures, strict=True))
    values, weights = values[weights > NEGLIGIBLE], weights[weights > NEGLIGIBLE]
    order = np.argsort(values)[::-1]
    values, weights = values[order], weights[order] / weights.sum()
    middle = np.cumsum(weights) - weights / 2
    return np.interp(np.linspace(0, 1, POINTS), np.r_[0, middle, 1], np.r_[values[0], values, values[-1]])


@torch.no_grad()
def ritz(
    factors: Factors, shape: tuple[int, int], *, seed: int = 0, steps: int = STEPS
) -> tuple[np.ndarray, np.ndarray]:
    """Return Ritz values of one expert's map and their weights, which sum to 1; [k] each, k <= steps.

    Factors are [R, 1, ...], the shape is (out, in).
    """
    device, kind = "cuda" if torch.cuda.is_available() else "cpu", cast(Any, type(factors))
    dtype = torch.float64 if shape[0] * shape[1] <= SMALL else torch.float32
    own = kind(*(t.to(device, dtype).contiguous() for t in factors))
    start = torch.Generator().manual_seed(seed)
    v = torch.randn(1, *shape, generator=start, dtype=torch.float64).to(device, dtype)
    v, u, beta = v / v.norm(), torch.zeros_like(v), 0.0
    diagonals: list[float] = []
    above: list[float] = []
    for _ in range(min(steps, v.numel())):
        u = own.transform(v, None) - beta * u  # M v
        alpha = float(u.norm())
        diagonals.append(alpha)
        u = u / max(alpha, torch.finfo(dtype).tiny)
        w = u.clone()
        own.transform_backward(w, u, None, learn=False)
        w = w - alpha * v  # M^T u - alpha v
        beta = float(w.norm())
        above.append(beta)
        if beta <= 16 * torch.finfo(dtype).eps * max(diagonals):
            break  # v lies in an invariant space of M: all of its values are there
        v = w / beta
    bidiagonal = np.diag(diagonals) + np.diag(above[:-1], 1)
    _, values, right = np.linalg.svd(bidiagonal)
    return values, right[:, 0] ** 2
