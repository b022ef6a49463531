"""`load_config`: a file and overrides to a `Config`, or all that is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from camex_ft.config.composition import compose
from camex_ft.config.identity import idle_routing_keys
from camex_ft.config.problems import ConfigErrors, Problem
from camex_ft.config.profiles import candidates, under
from camex_ft.config.rules import CHOICE
from camex_ft.config.schema import Config
from camex_ft.config.validation import check
from camex_ft.utils import registry


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Return what the file at `path` (or the shipped configuration of that name) says, with overrides applied.

    The profile's defaults are not in it yet: `resolve` puts them under what was written. Combinations are judged with
    them all the same: what is wrong under every profile that the run may have is reported here.

    Args:
        path: a YAML file, or a name from ``camex-ft ls configs``.
        overrides: ``a.b=value``, the value in YAML; later ones win.

    Raises:
        ConfigErrors: everything that is wrong, with files and lines.
    """
    written = compose(path, overrides)
    if not written.values and written.problems:
        raise ConfigErrors(written.problems)
    found = [check(under(profile, written))[1] for profile in candidates(written)]
    problems = _common(found)
    if problems:
        raise ConfigErrors(problems)
    return check(written)[0]


def notes(config: Config) -> list[str]:
    """Return remarks on keys that were written, differ from their default and have no effect beside the others."""
    written, default = config.model_dump(exclude_unset=True), Config()
    merging, remarks = written.get("merging", {}), []
    entry = registry.PROTOCOLS.get(config.merging.protocol)
    protocol = f"protocol '{entry.name}'"
    if (
        not entry.curvature
        and merging.get("curvature")
        and config.merging.curvature != default.merging.curvature
    ):
        remarks.append(f"merging.curvature has no effect: {protocol} has no curvature")
    if not entry.base and "alpha" in merging and config.merging.alpha != default.merging.alpha:
        remarks.append(f"merging.alpha has no effect: {protocol} has no base expert")
    remarks += _routing(config, written.get("routing", {}))
    for key in ("noise", "drop"):
        given = getattr(config.upcycle, key)
        if (
            config.upcycle.init != key
            and key in written.get("upcycle", {})
            and given != getattr(default.upcycle, key)
        ):
            remarks.append(f"upcycle.{key} has no effect with upcycle.init: {config.upcycle.init}")
    if config.data.dir is not None and config.data.source not in ("auto", "disk"):
        remarks.append(f"data.dir has no effect with data.source: {config.data.source}")
    return remarks


def _routing(config: Config, written: dict[str, Any]) -> list[str]:
    """Return remarks on keys of `routing` without effect."""
    if registry.PROTOCOLS.get(config.merging.protocol).form == "dense":
        return []
    default = Config().routing
    changed = [key for key in written if getattr(config.routing, key) != getattr(default, key)]
    idle = idle_routing_keys(config)
    remarks = [f"routing.{key} has no effect: {idle[key]}" for key in changed if idle.get(key)]
    if config.routing.router == CHOICE and config.merging.k >= config.merging.experts:
        remarks.append(
            "routing.router: expert-choice chooses nothing, since every expert takes every token; set merging.top_k "
            "below merging.experts"
        )
    if config.routing.router == CHOICE and "balance" in changed:
        remarks.append("routing.balance has no effect: experts that choose tokens have equal loads")
    return remarks


def _common(found: list[list[Problem]]) -> list[Problem]:
    """Return the problems that there are under every profile that the run may have."""
    first, *others = found
    return [
        p
        for p in first
        if all(any(p.key == q.key and p.origin == q.origin for q in other) for other in others)
    ]
