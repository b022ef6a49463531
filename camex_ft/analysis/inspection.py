"""Pictures and numbers of a finished run, from its record, history and model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from camex_ft.analysis.spectra import Spectrum, spectrum
from camex_ft.moe.layers.expert_linear import ExpertLinear
from camex_ft.moe.layers.ffn import ExpertFFN, MergedFFN
from camex_ft.moe.layers.low_rank_expert_linear import LowRankLinear
from camex_ft.moe.merging.base_expert import BaseExperts, gram_matrix
from camex_ft.results import RunFolder, load_record
from camex_ft.results.entries import Result
from camex_ft.results.plots import of_inspection, of_run, save
from camex_ft.results.plots import series as by_layer
from camex_ft.results.record import Record, all_finite, dumps
from camex_ft.results.report import Picture, ReportSection, write_report
from camex_ft.run.inference import load_trained, read_run
from camex_ft.run.steps import quieten
from camex_ft.upcycling import cached, expert_layers
from camex_ft.utils.durable import write_atomically
from camex_ft.utils.folders import writing

FOLDER = "inspection"
LARGE = 1 << 16  # entries of a matrix beyond which the spectra of fewer layers are computed
LINES = 200  # of the history, in the numbers


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Domain vectors of one layer: lengths [N] and cosine similarities [N, N]; NaN for a vector of length 0."""

    length: np.ndarray
    cosine: np.ndarray


@torch.no_grad()
def inspect(run_folder: Path | str, out: Path | str | None = None) -> Path:
    """Write pictures of a finished run, a page that holds them, and the numbers; return the page.

    Args:
        run_folder: of the run.
        out: folder of ``inspection.html``, ``inspection.json`` and the pictures; by default ``inspection/`` in the
            run's folder.

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
    pictures = [
        Picture(
            png=save(figure, target / f"{name}.png", source=numbers).read_bytes(),
            alt=choice.captions[name],
            caption=choice.captions[name],
        )
        for name, figure in choice.figures.items()
    ]
    notes = [f"{name}: left out, since {reason}" for name, reason in choice.left_out.items()]
    return write_report(
        [
            ReportSection(
                title=title, text=_summary(record, experts=bool(similarities)), command=record.run.command
            ),
            ReportSection(title="Pictures", pictures=pictures),
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
    spectra_: dict[str, dict[str, Spectrum]] = {}
    for name in chosen:
        spectra_[name] = {}
        for map_name, linear in curved[name].items():
            assert linear.curvature is not None
            shape = (linear.out_features, linear.in_features)
            spectrum_ = spectrum(linear.curvature.factors, kind=linear.curvature.kind, shape=shape)
            spectra_[name][map_name] = spectrum_
    return spectra_


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
        "routing": {name: layer.model_dump(mode="json") for name, layer in record.routing.items()},
        "curvature": {name: layer.model_dump(mode="json") for name, layer in record.curvature.items()},
        "domain_vectors": {n: {"length": v.length, "cosine": v.cosine} for n, v in similarities.items()},
        "spectrum": {
            name: {map_: {"exact": s.exact, "values": s.values} for map_, s in maps.items()}
            for name, maps in spectra_of.items()
        },
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
