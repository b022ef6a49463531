"""Machines to resolve configurations on."""

from __future__ import annotations

from camex_ft.config import Environment


def machine(
    *, cuda: bool = False, hub: bool = False, cached: tuple[str, ...] = (), configured: tuple[str, ...] = ()
) -> Environment:
    """An environment that answers as told; `cached` and `configured` name models and data in the hub's cache."""
    return Environment(
        cuda=lambda: cuda,
        hub=lambda: hub,
        model=lambda name: name in cached,
        architecture=lambda name: name in (*cached, *configured),
        data=lambda name, configuration: f"{name}:{configuration}" in cached,
    )
