"""Entries of a comparison that nobody ran: for pictures and reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from camex_ft.results.entries import Entry, Result, row_label
from camex_ft.results.record import Record

LAYERS = [f"bert.encoder.layer.{i}.ffn" for i in range(3)]
PLAIN: dict[str, Any] = {
    "run": {
        "name": "n",
        "profile": "embedded",
        "profile_reason": "asked for",
        "status": "done",
        "started": "2026-11-21T10:00:00Z",
        "seconds": 1.0,
        "command": "camex-ft run x",
        "exit": 0,
    },
    "config": {},
    "backbone": "embedded/bert",
    "model": {"parameters": 1000, "trainable": 1000, "active": 1000},
    "cost": {"samples_per_second": 1, "peak_memory_mb": 1, "device": "cpu"},
    "data": {"source": "embedded", "id": "x", "rows": {}, "sha256": ""},
    "environment": {"versions": {}, "commit": None, "dirty": None, "host": "cpu-2"},
}


def result(
    *,
    task: str,
    protocol: str,
    seed: int,
    scores: Sequence[float | None],
    experts: int = 4,
    layers: Sequence[str] = LAYERS,
    old: bool = False,
    greater: bool = True,
) -> Result:
    """A finished run with these scores after its epochs; `dense` has no experts; an old one lacks what came later."""
    rng = np.random.default_rng([seed, len(protocol), len(task)])
    known = [s for s in scores if s is not None]
    best = (max if greater else min)(known) if known else None
    primary = "accuracy" if greater else "perplexity"
    routing, curvature, load = {}, {}, {}
    if protocol != "dense":
        for layer in layers:
            weights = rng.dirichlet(np.full(experts, 3.0), size=3)
            by = {
                "domain": {str(i): weights[i].tolist() for i in range(3)},
                "label": {"no": weights[0].tolist(), "yes": weights[1].tolist()},
            }
            routing[layer] = {"entropy": 1.0, "load": weights[0].tolist(), **({} if old else {"by": by})}
            load[layer] = weights.tolist()
            if protocol.endswith("-ca"):
                curvature[layer] = {"distance": rng.uniform(0, 0.2, experts).tolist()}
    history: tuple[Mapping[str, Any], ...] = (
        ()
        if old
        else tuple(
            {
                "step": 10 * (i + 1),
                "epoch": (i + 1) / 10,
                "loss": float(np.exp(-i / 20) + 0.05 * rng.standard_normal()),
                **({"routing_load": {k: v[i % 3] for k, v in load.items()}} if load else {}),
            }
            for i in range(10 * len(scores))
        )
    )
    record = Record.model_validate(
        {
            **PLAIN,
            "task": task,
            "protocol": protocol,
            "seed": seed,
            "metrics": {
                "primary": primary,
                "greater_is_better": greater,
                "best": best,
                "best_epoch": None if best is None else list(scores).index(best) + 1,
                "last": scores[-1],
                "per_epoch": [
                    {"step": 10.0 * (i + 1), "epoch": i + 1.0, f"validation_{primary}": s, "validation_loss": 0.5}
                    for i, s in enumerate(scores)
                ],
                "all": {},
            },
            "routing": routing,
            "curvature": curvature,
        }
    )  # fmt: skip
    return Result(record=record, history=history)


def grid(
    *,
    tasks: Sequence[str] = ("glue/sst2",),
    rows: Sequence[Mapping[str, Any]] = (),
    seeds: int = 3,
    epochs: int = 3,
    **more: Any,
) -> list[Entry]:
    """Every task, row (its keys) and seed, with scores that rise from epoch to epoch."""
    made = []
    for t, task in enumerate(tasks):
        for r, keys in enumerate(rows):
            for seed in range(seeds):
                rng = np.random.default_rng([t, r, seed])
                top = 0.8 + 0.01 * r + 0.01 * rng.standard_normal()
                scores = [float(top - 0.1 / (e + 1)) for e in range(epochs)]
                made.append(
                    Entry(
                        task=task,
                        row=row_label(keys),
                        keys=keys,
                        seed=seed,
                        result=result(
                            task=task, protocol=keys["merging.protocol"], seed=seed, scores=scores, **more
                        ),
                    )
                )
    return made


def protocols(*names: str) -> list[dict[str, Any]]:
    """Rows that differ in their protocol alone."""
    return [{"merging.protocol": name} for name in names]
