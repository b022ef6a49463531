"""camex_ft: fine-tuning with merged experts.

    config -> data -> backbone -> upcycle -> train -> results

    load_config     a YAML file and overrides      -> Config              camex_ft.config
    train           Config                         -> Record              camex_ft.run.pipeline
    upcycle         a dense transformers model     -> one with experts    camex_ft.upcycling
    load            a folder, or an id on the hub  -> the model           camex_ft.upcycling
    export          a finished run                 -> a dense or folded one camex_ft.exporting
    routing_context an upcycled model              -> routing and balance loss of its last forward pass
    fixed_routing   a model and routing weights    -> a block in which every input has them
    merge           checkpoints of one start       -> one dense model       camex_ft.static

`import camex_ft` also lets transformers' auto classes load upcycled models (`camex_ft.hf`).
The method is in `camex_ft.moe` (routing, curvature, merging) and `camex_ft.protocols` (one file each).
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from camex_ft import hf

if TYPE_CHECKING:
    from camex_ft.config import load_config
    from camex_ft.exporting.export import export
    from camex_ft.run.pipeline import run as train
    from camex_ft.static.merge import merge
    from camex_ft.upcycling import fixed_routing, load, routing_context, upcycle
    from camex_ft.utils.errors import UserError

__all__ = [
    "UserError",
    "export",
    "fixed_routing",
    "load",
    "load_config",
    "merge",
    "routing_context",
    "train",
    "upcycle",
]

_PLACES = {
    "UserError": ("camex_ft.utils.errors", "UserError"),
    "export": ("camex_ft.exporting.export", "export"),
    "fixed_routing": ("camex_ft.upcycling", "fixed_routing"),
    "load": ("camex_ft.upcycling", "load"),
    "load_config": ("camex_ft.config", "load_config"),
    "merge": ("camex_ft.static.merge", "merge"),
    "routing_context": ("camex_ft.upcycling", "routing_context"),
    "train": ("camex_ft.run.pipeline", "run"),
    "upcycle": ("camex_ft.upcycling", "upcycle"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: most of them need torch."""
    if name not in _PLACES:
        raise AttributeError(f"module 'camex_ft' has no attribute '{name}'")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)


def _is_program() -> bool:
    """Return whether the package is imported by a program of its own: ``camex-ft``, or ``python -m camex_ft...``."""
    if "camex_ft_cli" in sys.modules:
        return True
    if (
        sys.argv[:1] != ["-m"] or "-m" not in sys.orig_argv
    ):  # the name of a program whose package is being imported
        return False
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    return module.partition(".")[0] == "camex_ft"


if not _is_program():  # programs import transformers where they need it
    hf.register()
