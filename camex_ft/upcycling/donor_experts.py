"""Donors as experts: fine-tuned checkpoints of one start become the experts of an upcycled model.

    E_i     the matrix of donor i                                    low rank: B_i A_i nearest to E_i - E_m
    E_m     the start's matrix, the donors' mean, or a checkpoint's
    others  the parameters outside the experts, theta, tau_i = theta_i - theta of the start:

        average      1/D sum_i theta_i
        arithmetic   theta + scale * sum_i tau_i             Ilharco et al. 2023 (arXiv 2212.04089)
        ties         theta + scale * mean of the tau_i       Yadav et al. 2023 (arXiv 2306.01708), entry by entry over
                     whose sign is that of sum_j tau_j       those that agree; nothing is trimmed
        first        theta_1

Of experts of low rank, B_i A_i is the truncated singular value decomposition of E_i - E_m: exact for an adapter of at
most that rank. Donors are loaded one after the other; `ties`, and low rank about the donors' mean, load each twice.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from camex_ft.backbones import family_of, select_layers
from camex_ft.backbones.donors import (
    ADAPTER,
    Likeness,
    backbone_of,
    check_same_config,
    check_same_shapes,
    check_same_vocabulary,
    donor_digest,
    shapes_of,
    with_adapter,
)
from camex_ft.backbones.heads import head_of, labels_of
from camex_ft.backbones.loading import load
from camex_ft.config import UpcycleConfig
from camex_ft.config.identity import folder_label
from camex_ft.config.needs import local_backbone
from camex_ft.config.schema import BASES
from camex_ft.moe.layers.ffn import ExpertFFN
from camex_ft.moe.layers.low_rank_expert_linear import LowRankLinear

Maps = Mapping[str, tuple[Tensor, Tensor | None]]
MEAN = "mean"  # base
TIES, FIRST = "ties", "first"  # others


@dataclass(frozen=True, kw_only=True)
class Donors:
    """Donors of an upcycling, with what is needed of the start to load them once it has been restructured.

    Attributes:
        models: names of checkpoints (`upcycle.from`), or dense models.
        upcycle: section of the configuration.
        others: parameters of the model outside the layers that get experts, by name.
        shapes: of the start's parameters.
        config: of the start.
        head: of the start; a key of `backbones.heads.HEADS`.
        tokenizer: of the start; None: vocabularies are not compared.
        start: copy of the start, where a donor is an adapter of it; else None.
    """

    models: tuple[PreTrainedModel | str, ...]
    upcycle: UpcycleConfig
    others: Mapping[str, nn.Parameter]
    shapes: Mapping[str, tuple[int, ...]]
    config: PreTrainedConfig
    head: str
    tokenizer: PreTrainedTokenizerBase | None = None
    start: PreTrainedModel | None = None

    @classmethod
    def of(
        cls,
        start: PreTrainedModel,
        models: Sequence[PreTrainedModel | str],
        upcycle: UpcycleConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Donors:
        """Return the donors of a start that is not restructured yet."""
        ffns = select_layers(family_of(start).ffns(start), upcycle.layers)
        within = tuple(f"{path}." for ffn in ffns for path in (ffn.path, *ffn.silence))
        others = {name: p for name, p in start.named_parameters() if not name.startswith(within)}
        adapters = any(isinstance(m, str) and m.startswith(ADAPTER) for m in (*models, upcycle.base))
        return cls(
            models=tuple(models),
            upcycle=upcycle,
            others=others,
            shapes=shapes_of(start),
            config=start.config,
            head=head_of(start),
            tokenizer=tokenizer,
            start=copy.deepcopy(start) if adapters else None,
        )

    def described(self) -> list[dict[str, Any]]:
        """Return the name and the SHA-256 of each donor; None for one in memory and for an embedded backbone."""
        return [
            {"name": _label(model), "sha256": donor_digest(model) if isinstance(model, str) else None}
            for model in self.models
        ]

    def section(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """Return the section `upcycle` for a saved model: without paths of this machine."""
        base = self.upcycle.base
        base = base if base in BASES else _label(base)
        return {**section, "from": [_label(model) for model in self.models], "base": base}

    def open(self, model: PreTrainedModel | str) -> PreTrainedModel:
        """Return a donor as a dense model.

        Raises:
            UserError: it is not there, or its architecture, vocabulary or start is another one.
        """
        spec = _label(model)
        if not isinstance(model, str):
            donor = model
        elif model.startswith(ADAPTER):
            donor = with_adapter(copy.deepcopy(cast(PreTrainedModel, self.start)).float(), model)
        else:
            donor, tokenizer = load(backbone_of(model), head=self.head, **labels_of(self.config, self.head))
            if self.tokenizer is not None:
                check_same_vocabulary(self.tokenizer, tokenizer, spec=spec)
        check_same_config(self.config, donor.config, spec=spec)
        check_same_shapes(self.shapes, shapes_of(donor), spec=spec)
        likeness = Likeness()
        for name, parameter in _named(donor, self.others):
            start = self.others[name].detach()
            likeness.add(start, parameter.to(start.device))
        likeness.check(spec)
        return donor


def _label(model: PreTrainedModel | str) -> str:
    if isinstance(model, str):
        return folder_label(model) if local_backbone(model) is not None else model
    return model.name_or_path or type(model).__name__


@torch.no_grad()
def fill_from_donors(layers: Mapping[str, ExpertFFN], donors: Donors) -> None:
    """Set experts, bases and the other parameters of a restructured model from its donors, in place.

    Args:
        layers: with experts, which hold the start's matrices; by path.
        donors: of the model, made before it was restructured.

    Raises:
        UserError: a donor is not there, or no donor of this start.
    """
    upcycle, count = donors.upcycle, len(donors.models)
    if upcycle.base not in BASES:
        for path, maps in _maps(donors.open(upcycle.base), layers):
            _set_base(layers[path], maps)
    late = upcycle.base == MEAN and any(layer.low_rank is not None for layer in layers.values())
    means = {path: _Mean(layer, count) for path, layer in layers.items()} if upcycle.base == MEAN else {}
    others = {name: _Other(p, upcycle, count) for name, p in donors.others.items()}
    for i, donor in enumerate(donors.models):
        model = donors.open(donor)
        for path, maps in _maps(model, layers):
            if path in means:
                means[path].add(maps)
            if not late:
                _set_experts(layers[path], maps, range(i * upcycle.each, (i + 1) * upcycle.each))
        for name, parameter in _named(model, others):
            others[name].add(parameter)
        del model
    for mean in means.values():
        mean.set()
    for i, donor in enumerate(donors.models if late or upcycle.others == TIES else ()):
        model = donors.open(donor)
        for path, maps in _maps(model, layers):
            if late:
                _set_experts(layers[path], maps, range(i * upcycle.each, (i + 1) * upcycle.each))
        for name, parameter in _named(model, others):
            if upcycle.others == TIES:
                others[name].add_agreeing(parameter)
        del model
    for other in others.values():
        other.set()


def _maps(model: PreTrainedModel, paths: Mapping[str, Any]) -> Iterator[tuple[str, Maps]]:
    """Yield the matrices of a dense model's feed-forward layers at these paths."""
    yield from ((ffn.path, ffn.weights) for ffn in family_of(model).ffns(model) if ffn.path in paths)


def _named(model: PreTrainedModel, names: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, p.detach()) for name, p in model.named_parameters() if name in names)


def _set_experts(layer: ExpertFFN, maps: Maps, places: range) -> None:
    for name, linear in layer.linears.items():
        weight, bias = maps[name]
        if isinstance(linear, LowRankLinear):
            out, within = _nearest_of_low_rank(
                weight.to(linear.base.device) - linear.base, linear.low_rank.rank
            )
        for i in places:
            if isinstance(linear, LowRankLinear):
                linear.expert_out[i].copy_(out / linear.low_rank.scale)
                linear.expert_in[i].copy_(within)
            else:
                linear.experts[i].copy_(weight)
            if linear.expert_bias is not None and bias is not None:
                linear.expert_bias[i].copy_(bias)


def _nearest_of_low_rank(tau: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B [out, rank] and A [rank, in] with B A the nearest to tau, |B| = |A|; of lower rank with zeros."""
    u, s, v = torch.linalg.svd(tau.double(), full_matrices=False)
    root = s[:rank].sqrt()
    out, within = tau.new_zeros(len(tau), rank), tau.new_zeros(rank, tau.shape[1])
    out[:, : len(root)] = (u[:, :rank] * root).to(tau.dtype)
    within[: len(root)] = (root[:, None] * v[:rank]).to(tau.dtype)
    return out, within


def _set_base(layer: ExpertFFN, maps: Maps) -> None:
    """Set the base expert, and the start of the means; layers that store none leave it."""
    for name, linear in layer.linears.items():
        for stored, new in zip((linear.base, linear.base_bias), maps[name], strict=True):
            if stored is not None and new is not None:
                stored.copy_(new)


class _Mean:
    """Mean of the donors' matrices of one layer, which becomes its base expert."""

    def __init__(self, layer: ExpertFFN, count: int) -> None:
        self.layer, self.count = layer, count
        self.sums: dict[str, tuple[Tensor, Tensor | None]] = {}

    def add(self, maps: Maps) -> None:
        for name, (weight, bias) in maps.items():
            if name not in self.sums:
                self.sums[name] = (
                    torch.zeros_like(weight),
                    None if bias is None else torch.zeros_like(bias),
                )
            for total, tensor in zip(self.sums[name], (weight, bias), strict=True):
                if total is not None and tensor is not None:
                    total.add_(tensor, alpha=1 / self.count)

    def set(self) -> None:
        _set_base(self.layer, self.sums)


class _Other:
    """One parameter outside the experts, merged from the donors' as `upcycle.others` says."""

    def __init__(self, parameter: nn.Parameter, upcycle: UpcycleConfig, count: int) -> None:
        self.parameter, self.upcycle, self.count = parameter, upcycle, count
        self.sum: Tensor | None = None  # of tau_i; the first donor's value for `first`
        self.agreeing: Tensor | None = None  # sum of the tau_i that agree with the sum's sign
        self.agree: Tensor | None = None  # how many these are

    def add(self, value: Tensor) -> None:
        value = value.to(self.parameter.device)
        if self.upcycle.others == FIRST:
            self.sum = value.clone() if self.sum is None else self.sum
        elif self.sum is None:
            self.sum = value - self.parameter
        else:
            self.sum += value - self.parameter

    def add_agreeing(self, value: Tensor) -> None:
        assert self.sum is not None
        tau = value.to(self.parameter.device) - self.parameter
        agrees = (tau.sign() == self.sum.sign()) & (tau != 0)
        if self.agreeing is None or self.agree is None:
            self.agreeing, self.agree = torch.zeros_like(tau), torch.zeros_like(tau)
        self.agreeing += torch.where(agrees, tau, 0)
        self.agree += agrees

    def set(self) -> None:
        assert self.sum is not None
        scale = self.upcycle.others_scale
        if self.upcycle.others == FIRST:
            self.parameter.copy_(self.sum)
        elif self.upcycle.others == "average":
            self.parameter.add_(self.sum / self.count)
        elif self.upcycle.others == "arithmetic":
            self.parameter.add_(scale * self.sum)
        else:
            assert self.agreeing is not None and self.agree is not None
            self.parameter.add_(scale * self.agreeing / self.agree.clamp_min(1))
