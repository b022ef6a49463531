"""A sparse mixture as the start: its routed experts and routers become those of the layers with experts, and back.

    E_i    expert i of the mixture; of DeepSeek `down` times the factor on the mixed outputs
    E_m    mean of the E_i
    W_g    the router's matrix, transposed; it routes pooled inputs, or tokens as before

With protocol `smoe`, which mixes outputs by token, the model computes what the mixture computes. Protocols that merge
weights compute something else from the start.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from camex_ft.backbones import DenseFFN, MixtureRouting, SparseFFN, family_of
from camex_ft.config import MergingConfig, RoutingConfig
from camex_ft.config.rules import not_from_mixture, other_number
from camex_ft.moe.layers.ffn import ExpertFFN, SharedBlock
from camex_ft.upcycling.plan import Plan
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import PROTOCOLS


def routing_of(model: PreTrainedModel) -> MixtureRouting | None:
    """Return the routing of a model's mixtures; None for a family of dense layers."""
    read = family_of(model).routing
    return None if read is None else read(model.config)


def settle_own_experts(plan: Plan, model: PreTrainedModel) -> Plan:
    """Return the plan with the numbers of the model's own mixtures where it leaves them out.

    Raises:
        UserError: it starts from a mixture in another way, or from own experts without a mixture; or its numbers are
            not those of the mixtures.
    """
    mixture, protocol = routing_of(model), PROTOCOLS.get(plan.merging.protocol)
    if protocol.form == "dense":
        return plan
    why = not_from_mixture(plan.upcycle.init, model.config.model_type, mixture, plan.tuning.mode)
    if why:
        raise UserError(why)
    if mixture is None:
        return plan
    merging = _settled_merging(plan.merging, mixture)
    routing = plan.routing
    if protocol.form == "outputs" and "normalise" not in routing.model_fields_set:
        routing = RoutingConfig.model_validate(
            {**routing.model_dump(exclude_unset=True), "normalise": mixture.normalise}
        )
    return plan._replace(merging=merging, routing=routing)


def _settled_merging(merging: MergingConfig, mixture: MixtureRouting) -> MergingConfig:
    own = {"experts": mixture.experts, "top_k": mixture.top_k}
    for key, value in own.items():
        said = getattr(merging, key)
        if key in merging.model_fields_set and said is not None and said != value:
            raise UserError(other_number(key, value, said))
    return merging.model_copy(update=own)


@torch.no_grad()
def start_from_mixture(model: nn.Module, layer: ExpertFFN, ffn: SparseFFN) -> None:
    """Set experts, base and router of a new layer from the mixture that it replaces, in place."""
    for name, linear in layer.linears.items():
        matrices = _scaled(ffn, name)
        linear.experts.copy_(matrices)
        if linear.base is not None:
            wide = torch.promote_types(matrices.dtype, torch.float32)
            linear.base.copy_(matrices.mean(0, dtype=wide))
    layer.router.gate.copy_(ffn.router.t())
    if ffn.shared:
        model.set_submodule(ffn.block, SharedBlock(model.get_submodule(ffn.block), ffn.shared))


def _scaled(ffn: SparseFFN, name: str) -> Tensor:
    return ffn.experts[name] * ffn.routing.scale if name == "down" else ffn.experts[name]


@torch.no_grad()
def fill_mixture(ffn: SparseFFN, experts: dict[str, Tensor], router: Tensor) -> None:
    """Set the experts [N, out, in] by map and the router's matrix W_g [d, N] of a mixture, in place."""
    for name, matrices in ffn.experts.items():
        scale = ffn.routing.scale if name == "down" else 1.0
        matrices.copy_(experts[name] / scale)  # a view of the model's own parameter
    ffn.router.copy_(router.t())


def mixtures_among(ffns: Sequence[DenseFFN]) -> list[SparseFFN]:
    """Return the mixtures among feed-forward layers."""
    return [ffn for ffn in ffns if isinstance(ffn, SparseFFN)]
