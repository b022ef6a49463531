"""Upcycled models made known to transformers' auto classes by `import camex_ft`, without importing transformers.

    import camex_ft             an entry of `sys.meta_path` waits for transformers' mapping from model types to
                                configuration classes; where that is there already, it is completed at once
    CONFIG_MAPPING["camex_x"]   makes the configuration class of x's upcycled models, and with it their classes
                                (`camex_ft.upcycling.classes`)

So the package starts without torch, and classes are made for the types that are asked for.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from camex_ft.utils.architectures import PREFIX

MAPPING = "transformers.models.auto.configuration_auto"


class _Known:
    """Mixed into the class of transformers' mapping: types of upcycled models are in it wherever the plain type is."""

    def __getitem__(self, key: str) -> Any:
        if not _upcycled(key) or super().__contains__(key) or key not in self:  # type: ignore[misc]
            return super().__getitem__(key)  # type: ignore[misc]
        from camex_ft.upcycling.classes import config_class

        return config_class(super().__getitem__(key.removeprefix(PREFIX)))  # type: ignore[misc]

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):  # type: ignore[misc]
            return True
        return _upcycled(key) and super().__contains__(str(key).removeprefix(PREFIX))  # type: ignore[misc]


def _upcycled(key: object) -> bool:
    return isinstance(key, str) and key.startswith(PREFIX)


class _Finder(MetaPathFinder):
    """Waits for the one module, and steps aside when it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MAPPING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                complete(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one loader
        return spec


def complete(module: Any) -> None:
    """Let the mapping in transformers' module know the types of upcycled models; a second call does nothing."""
    mapping = module.CONFIG_MAPPING
    kind = type(mapping)
    if not issubclass(kind, _Known):
        mapping.__class__ = type(kind.__name__, (_Known, kind), {"__module__": kind.__module__})


def register() -> None:
    """Make upcycled models known, now or when transformers' auto classes are imported."""
    module = sys.modules.get(MAPPING)
    if module is not None and hasattr(module, "CONFIG_MAPPING"):
        complete(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
