"""Types of models: which family of backbones serves one, and how many tokens its positions reach."""

from __future__ import annotations

from typing import Any

from camex_ft.utils import registry

PREFIX = "camex_"  # of `config.model_type` where a model has experts: camex_bert


def plain_type(model_type: str) -> str:
    """Return the `config.model_type` of the dense model that an upcycled one was made from, or its own."""
    return str(model_type).removeprefix(PREFIX)


def families() -> dict[str, Any]:
    """Return the family of each type of model that is supported, by `config.model_type`."""
    known = [registry.BACKBONES.get(name) for name in registry.BACKBONES.names()]
    return {model_type: family for family in known for model_type in family.model_types}


def positions(config: Any) -> int | None:
    """Return the most tokens that a model with this transformers configuration reads, or None where there is no limit.

    Args:
        config: of a dense or an upcycled model; one of a type that is not supported has no limit here.
    """
    family = families().get(plain_type(config.model_type))
    return None if family is None else family.positions(config)


def not_supported(model_type: object) -> str:
    """Say that no family serves a type of model, and which types are supported."""
    module = str(model_type).replace("-", "_")
    return (
        f"holds a model of the type '{model_type}', which no backbone family serves. Supported types: "
        f"{', '.join(sorted(families()))}. To add it, write one file, camex_ft/backbones/{module}.py, that lists its "
        f"feed-forward layers (or put that file in a folder named by {registry.PLUGINS})"
    )
