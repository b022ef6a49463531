"""What inspection says of a model, against matrices made in full; and what it leaves in a run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from camex_ft.analysis import inspect, inspection
from camex_ft.analysis.inspection import POINTS, ritz, spectrum
from camex_ft.moe.curvature import KINDS, Curvature, make_curvature
from camex_ft.moe.layers.ffn import ExpertFFN
from camex_ft.results.plots import is_stale, of_inspection
from camex_ft.results.run_folder import RunFolder
from camex_ft.upcycling import expert_layers, routing_context
from camex_ft.utils.errors import UserError
from tests.helpers.invariant_cases import Case, dense, shake, upcycled
from tests.helpers.synthetic_results import result
from tests.helpers.tiny import inputs_of

SHAPE = (12, 20)


def curvature(kind: str, rank: int) -> Curvature:
    """A curvature of two experts, away from the identity; float64."""
    torch.manual_seed(0)
    width, height = SHAPE[1], SHAPE[0]
    made = make_curvature(
        out_features=height, in_features=width, experts=2, rank=rank, bias=False, kind=kind
    ).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@torch.no_grad()
def singular_values(made: Curvature) -> np.ndarray:
    """Of the maps made in full, by applying them to every unit matrix; [N, out * in], largest first."""
    size = SHAPE[0] * SHAPE[1]
    found = []
    for i in range(2):
        units = torch.eye(size, dtype=torch.float64).view(size, *SHAPE)
        columns = [
            made.factors.transform(unit.expand(2, -1, -1).contiguous(), None)[i].flatten() for unit in units
        ]
        found.append(torch.linalg.svdvals(torch.stack(columns, dim=1)).numpy())
    return np.stack(found)


@pytest.mark.parametrize(
    ("kind", "rank"),
    [("kronecker", 1), ("diagonal", 1), ("diagonal", 3), ("low-rank", 1), ("low-rank", 3), ("low-rank", 12)],
)
def test_exact_spectra_are_those_of_the_whole_map(kind, rank):
    made = curvature(kind, rank)
    found = spectrum(made.factors, kind=kind, shape=SHAPE)
    full = singular_values(made)
    place = np.linspace(0, 1, full.shape[1])
    expected = [np.interp(np.linspace(0, 1, POINTS), place, values) for values in full]
    assert found.exact
    np.testing.assert_allclose(found.values, expected, rtol=1e-10)  # float64, products of four values


def test_ritz_values_of_all_steps_are_the_whole_spectrum():
    """Without rounding, as many steps as there are different values find them all; some 60 steps find the ends."""
    made = curvature("kronecker", 2)
    full = singular_values(made)[0]
    values, weights = ritz(next(iter(inspection._each(made.factors))), SHAPE, steps=60)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert values.max() == pytest.approx(full[0], rel=1e-8)
    assert values.min() == pytest.approx(full[-1], rel=1e-8)


def test_ritz_weights_give_the_moments():
    """Gauss quadrature: the mean of sigma^2 over random starts is ||M||_F^2 / n."""
    made = curvature("kronecker", 3)
    full = singular_values(made)[0]
    one = next(iter(inspection._each(made.factors)))
    found = [float(values**2 @ weights) for values, weights in (ritz(one, SHAPE, seed=s) for s in range(30))]
    error = np.std(found, ddof=1) / len(found) ** 0.5
    assert abs(np.mean(found) - (full**2).mean()) < 4 * error


def test_estimated_spectra_are_near_the_true_ones():
    made = curvature("kronecker", 2)
    found = spectrum(made.factors, kind="kronecker", shape=SHAPE)
    full = singular_values(made)
    expected = [np.interp(np.linspace(0, 1, POINTS), np.linspace(0, 1, 240), values) for values in full]
    assert not found.exact
    assert (np.diff(found.values, axis=1) <= 0).all()
    # 240 entries are few: a start weighs them with a relative deviation of (2 / 240)^0.5, about 9%
    np.testing.assert_allclose(found.values, expected, atol=0.15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 2])
def test_the_identity_has_ones(kind, rank):
    made = make_curvature(out_features=12, in_features=20, experts=2, rank=rank, bias=False, kind=kind)
    found = spectrum(made.factors, kind=kind, shape=SHAPE)
    np.testing.assert_allclose(found.values, 1, atol=1e-5)  # float32 factors


def test_very_many_products_keep_both_ends(monkeypatch):
    monkeypatch.setattr(inspection, "MOST", 1000)
    sides = [np.random.default_rng(i).uniform(0.5, 2, 100) for i in range(3)]
    found = inspection._products(*sides)
    assert found.size <= 1000
    assert found.max() == pytest.approx(np.prod([s.max() for s in sides]))
    assert found.min() == pytest.approx(np.prod([s.min() for s in sides]))


def cosines(layer: ExpertFFN, bases: dict[str, tuple[Tensor, Tensor | None]]) -> np.ndarray:
    """Cosine similarities of the domain vectors, each written out as one long vector."""
    parts = []
    for name, linear in layer.linears.items():
        weight, bias = bases[name]
        parts.append((linear.experts - weight).flatten(1))
        if linear.expert_bias is not None:
            parts.append(linear.expert_bias - bias)
    vectors = torch.nn.functional.normalize(torch.cat(parts, dim=1).double(), dim=1)
    return (vectors @ vectors.mT).numpy()


@pytest.mark.parametrize("protocol", ["ties-ca", "smear", "smoe"])
@torch.no_grad()
def test_similarity_of_domain_vectors(protocol):
    model = shake(upcycled(Case("bert", "sequence-classification", protocol, "auto")))
    for layer in expert_layers(model).values():
        bases = {
            name: (
                m.experts.mean(0) if m.base is None else m.base,
                m.expert_bias.mean(0) if m.base_bias is None else m.base_bias,
            )
            for name, m in layer.linears.items()
        }
        found = inspection.domain_vectors(layer)
        np.testing.assert_allclose(found.cosine, cosines(layer, bases), atol=1e-5)  # float32 products


@torch.no_grad()
def test_similarity_with_a_base_expert_that_is_carried():
    model = shake(upcycled(Case("bert", "sequence-classification", "namex-full", "auto"))).eval()
    model(**inputs_of(model, "sequence-classification"))
    carried = routing_context(model).last.base_experts
    assert carried
    for name, bases in carried.items():
        layer = expert_layers(model)[name]
        given = {k: (b.weight.base, None if b.bias is None else b.bias.base) for k, b in bases.items()}
        np.testing.assert_allclose(inspection.domain_vectors(layer).cosine, cosines(layer, given), atol=1e-5)


def test_domain_vectors_of_length_0_have_no_similarity():
    layer = next(
        iter(expert_layers(upcycled(Case("bert", "sequence-classification", "ties", "auto"))).values())
    )
    with torch.no_grad():
        for linear in layer.linears.values():
            linear.experts.copy_(linear.base.expand_as(linear.experts))
    found = inspection.domain_vectors(layer)
    assert (found.length == 0).all()
    assert np.isnan(found.cosine).all()


def inspected(folder: Path, protocol: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict]:
    """Inspect a run folder with a record and a history, whose model is a tiny one."""
    case = Case("bert", "sequence-classification", protocol, "auto")
    model = dense("bert", "sequence-classification") if protocol == "dense" else shake(upcycled(case)).float()
    run = RunFolder.create(folder, protocol)
    made = result(task="glue/sst2", protocol=protocol, seed=3, scores=[0.5, 0.75])
    run.write_record(made.record)
    for line in made.history:
        run.append_history(dict(line))
    monkeypatch.setattr(inspection, "read_run", lambda _: None)
    monkeypatch.setattr(inspection, "load_trained", lambda _: (model, None))
    path = inspect(run.path)
    return path, json.loads((path.parent / "inspection.json").read_text())


def test_a_run_of_experts(tmp_path, monkeypatch):
    page, numbers = inspected(tmp_path, "ties-ca", monkeypatch)
    assert page == tmp_path / "runs" / "ties-ca" / "inspection" / "inspection.html"
    names = [
        "loss",
        "score",
        "routing-domain",
        "routing-label",
        "load",
        "curvature",
        "similarity",
        "spectrum",
    ]
    assert {p.name for p in page.parent.iterdir()} == {
        "inspection.html",
        "inspection.json",
        *(f"{n}.png" for n in names),
    }
    text = page.read_text()
    assert text.count("<img ") == len(names)
    assert "glue/sst2: ties-ca, seed 3" in text
    some = next(iter(numbers["spectrum"].values()))
    assert set(some) == {"up", "down"}
    assert np.shape(some["up"]["values"])[1] == POINTS
    assert all(np.allclose(np.diagonal(v["cosine"]), 1) for v in numbers["domain_vectors"].values())
    assert len(numbers["history"]) == 20
    assert not is_stale(page.parent / "similarity.png", numbers)  # as it is read again
    assert list(of_inspection(numbers).figures) == ["similarity", "spectrum"]


def test_a_dense_run_has_curves_alone(tmp_path, monkeypatch):
    page, numbers = inspected(tmp_path, "dense", monkeypatch)
    assert {p.name for p in page.parent.iterdir()} == {
        "inspection.html", "inspection.json", "loss.png", "score.png"
    }  # fmt: skip
    assert "has no experts" in page.read_text()
    assert numbers["domain_vectors"] == {} == numbers["spectrum"]


def test_what_is_no_run_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        inspect(tmp_path)
    assert list(tmp_path.iterdir()) == []
