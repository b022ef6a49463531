"""The entry ``camex`` in the config of an upcycled model: what was done to it, and which versions wrote it.

merging, routing, upcycle[, tuning]   sections of the configuration
backbone                              of low-rank experts: see `adapters`
causal                                of a language model under another head: it is routed as before
format, versions                      added when it is saved
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from camex_ft.upcycling.restructuring import Plan, plan_of
from camex_ft.utils.errors import UserError
from camex_ft.utils.registry import PROTOCOLS

KEY = "camex"
FORMAT = 1  # entries before it had none; the next one is for what this version would read wrongly
PACKAGES = ("camex_ft", "torch", "transformers", "peft")


def versions() -> dict[str, str]:
    """Return the versions of the packages that a saved model depends on."""
    return {name: _version(name) for name in PACKAGES}


def stamped(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry with this format and these versions."""
    return {**saved, "format": FORMAT, "versions": versions()}


def plan(saved: Any) -> Plan:
    """Return the plan of an entry.

    Raises:
        UserError: it is of a newer format, or says what this version does not know; names the versions that wrote it.
    """
    if not isinstance(saved, Mapping):
        raise UserError(
            f"the entry `{KEY}` of its config.json is {saved!r:.80}: expected a mapping with the plan"
        )
    check_format(saved, what=f"the entry `{KEY}` of its config.json")
    try:
        found = plan_of(saved)
        PROTOCOLS.get(found.merging.protocol)
        return found
    except UserError as error:
        raise UserError(
            f"the entry `{KEY}` of its config.json says what this version of camex_ft does not know: {error}\n"
            f"It was {written_by(saved)}; this is camex_ft {_version('camex_ft')}. If that one is newer: install it"
        ) from error


def check_format(saved: Mapping[str, Any], *, what: str) -> None:
    """Raise `UserError` unless this version reads the format; one without is of before formats had numbers."""
    found = saved.get("format", 0)
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found <= FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        raise UserError(
            f"{what} is of format {found!r:.40}, {written_by(saved)}; this is camex_ft {_version('camex_ft')}, which "
            f"reads formats up to {FORMAT}: " + ("install that version" if newer else "the file is damaged")
        )


def written_by(saved: Any) -> str:
    """Return "written by camex_ft 0.1.0, torch ...", as far as the entry says it."""
    said = saved.get("versions") if isinstance(saved, Mapping) else None
    known = [f"{name} {said[name]}" for name in PACKAGES if name in said] if isinstance(said, Mapping) else []
    return "written by " + (", ".join(known) or "a version of camex_ft that does not say which")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
