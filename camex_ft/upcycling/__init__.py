"""Upcycling: a backbone's dense feed-forward layers become experts, and the function that it computes stays the same.

    dense model --copy--> model --restructure (chosen layers -> MergedFFN or MixtureFFN)--> upcycled model
    upcycled model --save--> a folder --load--> upcycled model             low-rank experts alone: `adapters`

The model's config holds the plan, under ``camex`` (`plan`), and its class is one of `model_classes`, so that `load` and
transformers' auto classes find both in a saved checkpoint.
Source: sparse upcycling, Komatsuzaki et al. 2023 (arXiv 2212.05055), as CAMEx uses it.
"""

from __future__ import annotations

from camex_ft.upcycling.adapters import restore, save, trained_state
from camex_ft.upcycling.freezing import (
    base_chains,
    cached,
    caches,
    expert_layers,
    fixed_routing,
    freeze,
    keep_nothing,
    routing_context,
)
from camex_ft.upcycling.model_classes import plain_class
from camex_ft.upcycling.plan import granularity_of, plain_config
from camex_ft.upcycling.router_fit import fit_routers
from camex_ft.upcycling.upcycled import for_run, load, upcycle

__all__ = [
    "base_chains",
    "cached",
    "caches",
    "expert_layers",
    "fit_routers",
    "fixed_routing",
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
