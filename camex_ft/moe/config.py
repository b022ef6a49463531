"""Settings that a model's expert layers share, and the interface of a merging protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from camex_ft.moe.merging.base_expert import Step
from camex_ft.moe.merging.domain_vectors import Multiplier
from camex_ft.moe.routing.router import Grouping, RouterSettings


class Rule(Protocol):
    """Interface of a merging protocol to a layer."""

    @property
    def multiplier(self) -> Multiplier | None:
        """The multiplier of domain vectors, or None for one everywhere."""

    @property
    def statistic(self) -> bool:
        """Return whether the multiplier depends on a running statistic of gradients."""

    @property
    def step(self) -> Step | None:
        """The step of the base expert from layer to layer; None where every layer stores its own."""

    @property
    def bargains(self) -> bool:
        """Return whether `step` takes the `vectors`, and so may solve for Nash weights."""

    @property
    def needs_mean(self) -> bool:
        """Return whether `step` takes the `mean` of the transformed domain vectors."""

    def update(self, statistic: Tensor, gradient: Tensor) -> Tensor:
        """Return the statistic after an optimizer step, from the gradient of T."""


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """Settings that all expert layers of a model share.

    Attributes:
        rule: the merging protocol.
        experts, top_k: N and k.
        base: store a base expert E_m.
        rank: R of the curvature; 0 has none.
        curvature: its kind, one of `curvature.KINDS`.
        alpha: merging step size.
        noise: draw routing noise in training.
        balance: coefficient of the balance loss.
        grouping: of tokens that share routing weights.
        router: settings of the router.
        keep_vectors: cache transformed domain vectors while they stay the same.
    """

    rule: Rule
    experts: int
    top_k: int
    base: bool = True
    rank: int = 0
    curvature: str = "kronecker"
    alpha: float = 1.0
    noise: bool = True
    balance: float = 1e-2
    grouping: Grouping = field(default_factory=Grouping)
    router: RouterSettings = field(default_factory=RouterSettings)
    keep_vectors: bool = True
