"""Lines of a training's log: one JSON object a logging step, as ``history.jsonl`` and a checkpoint's state hold them.

    {"step": 10, "epoch": 0.5, "loss": 0.69, "routing_load": {"encoder.0": [0.5, 0.5]}}

A line of another form, from another program or an editor, is passed over with the reason.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from camex_ft.utils.durable import open_regular
from camex_ft.utils.folders import short

LOAD = "routing_load"
MOST = 2**53  # steps, exact as a number of JSON
log = logging.getLogger(__name__)


def fault(entry: Any) -> str | None:
    """Return the fault of an entry of a log, or None."""
    if not isinstance(entry, dict):
        return "it is no object"
    step = entry.get("step")
    if type(step) is not int or not 0 <= step <= MOST:
        return f"its step is {short(step)}: expected a whole number" if "step" in entry else "it has no step"
    for key, value in entry.items():
        if key == LOAD:
            lists = value.values() if isinstance(value, dict) else [None]
            if not all(isinstance(shares, list) and all(map(_is_number, shares)) for shares in lists):
                return f"its {key} is {short(value)}: expected lists of numbers by layer"
        elif not _is_number(value):
            return f"its {short(key)} is {short(value)}: expected a number"
    return None


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the entries in a file of JSON lines; a missing file holds none.

    Others are left out, with a warning but for an end that a killed run cut short.
    """
    try:
        with open_regular(file) as stream:
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return []
    entries = []
    experts: dict[str, int] = {}  # by layer, of the first line that has them
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            wrong = fault(entry) or _load_fault(entry, experts)
        except (ValueError, RecursionError) as error:
            wrong = f"it is no JSON: {error}" if line.strip() and number < len(lines) else ""
        if wrong is None:
            entries.append(entry)
        elif wrong:
            log.warning("%s: line %d is passed over: %s", file, number, wrong)
    return entries


def _load_fault(entry: dict[str, Any], experts: dict[str, int]) -> str | None:
    """Return the fault of a line's load, or None; add its numbers of experts to `experts`."""
    for layer, shares in entry.get(LOAD, {}).items():
        if len(shares) != experts.setdefault(layer, len(shares)):
            return f"its {LOAD} of {short(layer)} has {len(shares)} experts, and {experts[layer]} in lines before"
    return None


def _is_number(value: Any) -> bool:
    """Return whether a value is a number that a float can hold, or none at all."""
    if value is None or isinstance(value, bool):
        return value is None
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False
