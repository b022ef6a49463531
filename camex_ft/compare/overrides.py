"""Changes to a configuration as ``key=value`` texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from camex_ft.config.reading import Dumper


def overrides_of(changes: Mapping[str, Any]) -> list[str]:
    """Return changes by dotted key as texts that `load_config` takes."""
    return [override(key, value) for key, value in changes.items()]


def override(key: str, value: Any) -> str:
    """Return ``key=value``, the value in YAML on one line."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True)
    flow = text.removesuffix("\n").removesuffix("\n...")
    return f"{key}={flow}"


def key_of(text: str) -> str:
    """Return the key of an override."""
    return text.partition("=")[0].strip()
