"""Invariant 7: the numbers of the published formulas, through the layers that training uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from camex_ft.moe.config import LayerSettings
from camex_ft.moe.context import RoutingContext
from camex_ft.moe.layers.expert_linear import ExpertLinear
from camex_ft.moe.layers.ffn import MixtureFFN
from camex_ft.moe.routing.losses import sum_losses
from camex_ft.moe.routing.router import Grouping, Router, TokenPositions
from camex_ft.utils.registry import PROTOCOLS
from tests.helpers.expert_layers import grouped, restored

# float64 sums in another order differ by about 1e-14; the balance loss was summed in float32 (parts in 1e7 of 1e-3)
EXACT, BALANCE = 1e-9, 1e-9
SINGLE = 1e-5  # float32, values up to about 10
NAMES = {
    "weight": "experts",
    "res_weight": "base",
    "bias": "expert_bias",
    "res_bias": "base_bias",
    "curve1_out": "curvature.a1",
    "curve2_out": "curvature.a2",
    "curve1_in": "curvature.c1",
    "curve2_in": "curvature.c2",
    "curve1_bias": "curvature.b1",
    "curve2_bias": "curvature.b2",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder: Path = metafunc.config.getoption("--golden-dir")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise pytest.UsageError(f"--golden-dir: no *.safetensors files in {folder}")
    metafunc.parametrize("file", files, ids=[f.stem for f in files])


def full_pass(x: Tensor) -> TokenPositions:
    return TokenPositions((x.shape[0], x.shape[1]))


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(file, "pt") as opened:
        metadata = {key: json.loads(value) for key, value in opened.metadata().items()}
        return metadata, {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


def settings_of(meta: dict[str, Any]) -> LayerSettings:
    name = "smoe" if meta.get("protocol") == "smoe" else {"none": "domain"}.get(meta["mask"], meta["mask"])
    protocol = PROTOCOLS.get(f"{name}-ca" if meta.get("curvature") else name)
    return LayerSettings(
        rule=protocol,
        experts=meta["experts"],
        top_k=meta["top_k"],
        base=protocol.base,
        rank=meta["rank"] if protocol.curvature else 0,
        noise=False,
        balance=meta["balance_coef"],
        grouping=Grouping(meta["routing"], meta.get("segment_length", 256), "self"),
    )


def router_of(settings: LayerSettings, gate: Tensor) -> Router:
    router = Router(
        in_features=gate.shape[0], experts=settings.experts, top_k=settings.top_k, noise=False, prior=False
    )
    router.gate = nn.Parameter(gate.clone())
    return router


def linear_of(settings: LayerSettings, parameters: dict[str, Tensor]) -> ExpertLinear:
    """Return a layer that holds the file's parameters; those without an axis for the rank get one."""
    weight, bias = parameters["res_weight"], parameters.get("res_bias")
    linear = ExpertLinear(weight, None if bias is None else bias[0], settings)
    for theirs, ours in NAMES.items():
        if theirs in parameters:
            target = linear.get_parameter(ours)
            target.data.copy_(parameters[theirs].reshape(target.shape))
    return linear


def test_merged_map(file: Path) -> None:
    meta, tensors = read(file)
    if meta.get("protocol") == "smoe":
        pytest.skip("a mixture: test_mixture")
    settings = settings_of(meta)
    parameters = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    linear, router = linear_of(settings, parameters), router_of(settings, parameters["w_gate"])
    x = tensors["x"].clone().requires_grad_()

    groups = grouped(x, full_pass(x), router, settings.grouping)
    y = restored(groups, linear(groups.x, groups.weights))
    balance = sum_losses(groups.routing, top_k=settings.top_k, coef=settings.balance, mask=groups.mask).loss()
    (y * tensors["grad_y"]).sum().backward()

    close(y, tensors["y"], EXACT)
    close(balance.reshape(1), tensors["balance_loss"], BALANCE)
    close(x.grad, tensors["grad_x"], EXACT)
    close(router.gate.grad, tensors["grad.w_gate"], EXACT)
    for theirs, ours in NAMES.items():
        if f"grad.{theirs}" in tensors:
            grad = linear.get_parameter(ours).grad
            assert grad is not None, ours
            close(grad, tensors[f"grad.{theirs}"].reshape(grad.shape), EXACT)


def test_mixture(file: Path) -> None:
    meta, tensors = read(file)
    if meta.get("protocol") != "smoe":
        pytest.skip("a merged map: test_merged_map")
    settings = settings_of(meta)
    experts = torch.stack([tensors[f"param.experts.{i}.dense.weight"] for i in range(meta["experts"])])
    width = experts.shape[-1]
    layer = MixtureFFN(
        {"up": (torch.eye(width), None), "down": (experts[0], None)},  # `up` passes x on: one map is left
        nn.Identity(),
        name="layer",
        stack="encoder",
        context=RoutingContext(lambda module, arguments: pytest.fail("not called")),
        settings=settings,
    )
    layer.down.experts.data.copy_(experts)
    layer.router = router_of(settings, tensors["param.w_gate"])
    x = tensors["x"].clone().requires_grad_()

    groups = grouped(x, full_pass(x), layer.router, settings.grouping)
    y = layer(x)
    (y * tensors["grad_y"]).sum().backward()

    close(y, tensors["y"], SINGLE)
    balance = sum_losses(groups.routing, top_k=settings.top_k, coef=settings.balance).loss()
    close(balance.reshape(1).double(), tensors["balance_loss"].double(), SINGLE)
    close(x.grad, tensors["grad_x"], SINGLE)
    close(layer.router.gate.grad, tensors["grad.w_gate"], SINGLE)
    for i in range(meta["experts"]):
        close(layer.down.experts.grad[i], tensors[f"grad.experts.{i}.dense.weight"], SINGLE)


def close(ours: Tensor | None, theirs: Tensor, tolerance: float) -> None:
    assert ours is not None
    torch.testing.assert_close(ours.detach(), theirs, rtol=tolerance, atol=tolerance)
