"""What the invariants run over: every registered protocol, type of backbone, head and granularity that go together.

All of it is read from the registries when tests are collected: a new protocol or backbone is covered at once.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from camex_ft.backbones import family_of, generates
from camex_ft.upcycling import upcycle
from camex_ft.utils import registry
from camex_ft.utils.errors import FunctionChanged
from camex_ft.utils.registry import PROTOCOLS
from tests.helpers.tiny import VARIANTS, family_names, heads_of, make, model_types

EXPERTS, RANK, SEGMENT = 3, 2, 3
MERGING = {"experts": EXPERTS, "curvature": {"rank": RANK}}
FULL = ("sequence-classification", "causal-lm", "seq2seq-lm")
ONE_OF_EACH_FORM = ("ties-ca", "smoe")


class Case(NamedTuple):
    """A type of backbone under a head, and how its experts are merged and routed."""

    model_type: str
    head: str
    protocol: str
    granularity: str

    def __str__(self) -> str:
        return "-".join(self)


def upcycled(case: Case, **merging: Any) -> PreTrainedModel:
    """Return the dense model upcycled as the case says, in evaluation mode."""
    routing = {"granularity": case.granularity, "segment": SEGMENT}
    if case.model_type in model_types(mixtures=True):
        return of_mixture(dense(case.model_type, case.head), case.protocol, **routing)
    return upcycle(
        dense(case.model_type, case.head),
        merging={**MERGING, "protocol": case.protocol, **merging},
        routing=routing,
    ).eval()


def of_mixture(model: PreTrainedModel, protocol: str, **routing: Any) -> PreTrainedModel:
    """Return a sparse mixture upcycled from its own experts, in evaluation mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FunctionChanged)
        return upcycle(
            model,
            merging={"protocol": protocol, "curvature": {"rank": RANK}},
            routing=routing,
            upcycle={"init": "own-experts"},
        ).eval()


@torch.no_grad()
def shake(model: PreTrainedModel, scale: float = 0.2) -> PreTrainedModel:
    """Move every parameter at random, as training would: experts come to differ, the curvature leaves the identity."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


@cache
def dense(model_type: str, head: str) -> PreTrainedModel:
    """Return a tiny dense model, or a sparse mixture; shared, since upcycling copies."""
    mixture = model_type in model_types(mixtures=True)
    return make(model_type, head, VARIANTS[model_type][0] if mixture else {})


def cases(*heads: str) -> list[Case]:
    """Return the cases under these heads (default: all).

    The first type of every family meets every protocol under the heads of `FULL`, and there one protocol of each form
    also meets every granularity that it allows; other types and heads, which only pass hidden states on, meet one
    protocol of each form.
    """
    found = []
    for family in family_names():
        for position, model_type in enumerate(registry.BACKBONES.get(family).model_types):
            for head in heads or heads_of(model_type):
                if head not in heads_of(model_type):
                    continue
                full = position == 0 and head in FULL
                for protocol in PROTOCOLS.names() if full else ONE_OF_EACH_FORM:
                    found.append(Case(model_type, head, protocol, "auto"))
                for protocol in ONE_OF_EACH_FORM if full else ():
                    found += [
                        Case(model_type, head, protocol, g)
                        for g in _granularities(model_type, head, protocol)
                    ]
    return found


def mixture_cases() -> list[Case]:
    """Return the cases of sparse mixtures as the start: one protocol of each form."""
    return [Case(t, "causal-lm", p, "auto") for t in model_types(mixtures=True) for p in ONE_OF_EACH_FORM]


def causal_cases() -> list[Case]:
    """Return the cases with experts in a causal stack under a head that generates."""
    found = [c for c in cases("causal-lm", "seq2seq-lm") if c.protocol != "dense"]
    return [c for c in found if _is_causal(c.model_type, c.head)]


@cache
def _is_causal(model_type: str, head: str) -> bool:
    model = dense(model_type, head)
    return any(ffn.stack == "decoder" for ffn in family_of(model).ffns(model))


def _granularities(model_type: str, head: str, protocol: str) -> list[str]:
    model = dense(model_type, head)
    possible = ["segment", "token"]
    if not generates(model):
        possible.append("sequence")
    if model.config.is_encoder_decoder:
        possible.append("encoder")
    return [g for g in possible if g in PROTOCOLS.get(protocol).granularities]


def output(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return the model's main output: logits, or hidden states where there is no head."""
    made = model(**inputs)
    for name in ("logits", "start_logits", "last_hidden_state"):
        if getattr(made, name, None) is not None:
            return getattr(made, name)
    raise AssertionError(f"{type(model).__name__} returned {list(made)}")
