"""Upcycling: a backbone's dense feed-forward layers become experts, and the function that it computes stays the same.

    dense model --copy--> model --restructure (chosen layers -> MergedFFN or MixtureFFN)--> upcycled model
    upcycled model --save--> a folder --load--> upcycled model             low-rank experts alone: `adapters`

What was done is kept in the model's own config, under ``camex`` (`entry`), and its class is one of `classes`, so that
`load` and transformers' auto classes find it in a saved checkpoint.
Source: sparse upcycling, Komatsuzaki et al. 2023 (arXiv 2212.05055), as CAMEx uses it.
"""

from __future__ import annotations

from camex_ft.upcycling.adapters import restore, save, trained_state
from camex_ft.upcycling.classes import plain_class, plain_config
from camex_ft.upcycling.granularities import granularity_of
from camex_ft.upcycling.layers import (
    base_chains,
    cached,
    caches,
    expert_layers,
    freeze,
    keep_nothing,
    routing_context,
)
from camex_ft.upcycling.loading import load
from camex_ft.upcycling.making import for_run, upcycle

__all__ = [
    "base_chains",
    "cached",
    "caches",
    "expert_layers",
    "for_run",
    "freeze",
    "granularity_of",
    "keep_nothing",
    "load",
    "plain_class",
    "plain_config",
    "restore",
    "routing_context",
    "save",
    "trained_state",
    "upcycle",
]
