"""``camex-ft bench decode``: what a token costs that is generated with a key-value cache, dense and with experts.

A prompt is read into each model's cache; then some tokens are fed one by one, all within one segment, and taken back
from the cache, so that every repeat begins at the same place. The merged experts of a segment are made at its first
token, which is timed apart.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from camex_ft.bench.backbones import build, inputs
from camex_ft.bench.settings import DecodeBench
from camex_ft.bench.step import APART
from camex_ft.bench.timing import Side, alternate, medians, timed
from camex_ft.upcycling import cached, upcycle


def dense_model(settings: DecodeBench) -> PreTrainedModel:
    """Return the dense backbone under its language-modelling head."""
    model = build(settings.backbone, head="causal-lm").eval()
    model.to(device=settings.device, dtype=getattr(torch, settings.dtype))
    return model


def upcycled(dense: PreTrainedModel, settings: DecodeBench) -> PreTrainedModel:
    """Return a copy of `dense` with experts in every layer, which differ from the base."""
    made = upcycle(
        dense,
        merging={
            "protocol": settings.protocol,
            "experts": settings.experts,
            "top_k": settings.top_k,
            "curvature": {"kind": settings.curvature, "rank": settings.rank},
        },
        routing={"segment": settings.segment},
        upcycle={"layers": "all", "init": "noise", "noise": APART},
    )
    return made.eval()


class Decoding:
    """One model with the prompts in its cache."""

    def __init__(self, model: PreTrainedModel, settings: DecodeBench) -> None:
        self.model, self.settings = model, settings
        ids = inputs(model, batch=settings.batch, length=settings.length + settings.tokens)["input_ids"]
        if settings.same_prompt:
            ids = ids[:1].repeat(settings.batch, 1)
        self.next = ids[:, settings.length :]
        self.cache = DynamicCache(config=model.config)
        self._feed(ids[:, : settings.length])

    @torch.inference_mode()
    def _feed(self, ids: torch.Tensor) -> None:
        self.model(ids, past_key_values=self.cache, use_cache=True)

    def token(self) -> None:
        """Feed one token."""
        self._feed(self.next[:, :1])

    def __call__(self) -> None:
        """Feed the tokens one by one."""
        for t in range(self.settings.tokens):
            self._feed(self.next[:, t : t + 1])

    def back(self) -> None:
        """Return to the end of the prompt."""
        self.cache.crop(self.settings.length - self.cache.get_seq_length())


def bench_decode(settings: DecodeBench) -> dict[str, Any]:
    """Return the figures: median seconds a token, dense and upcycled, their ratio, seconds that merging takes once."""
    dense = dense_model(settings)
    sides = {"dense": Decoding(dense, settings), "upcycled": Decoding(upcycled(dense, settings), settings)}
    gc.collect()
    with cached(sides["upcycled"].model):  # as in `generate`
        first = timed(Side(sides["upcycled"].token), settings.device)
        runs = {name: Side(side, side.back) for name, side in sides.items()}
        times = alternate(runs, repeats=settings.repeats, device=settings.device)
    times = {name: [each / settings.tokens for each in side] for name, side in times.items()}
    median = medians(times)
    return {
        "dense_step_s": median["dense"],
        "step_s": median["upcycled"],
        "ratio_dense": median["upcycled"] / median["dense"],
        "first_token_s": first,
        "merging_a_token_s": max(0.0, first - median["upcycled"]) / settings.segment,
        "times": times,
    }
