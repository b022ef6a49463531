"""Registries filled by scanning packages: a new protocol, backbone or task is one new file, and no list is edited.

A file registers what it defines when it is imported. `Registry.names` imports the modules of its package, then every
``*.py`` file in the folders that the environment variable ``CAMEX_FT_PLUGINS`` names (separated as in ``PATH``).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from pathlib import Path
from typing import Any, Generic, TypeVar

from camex_ft.utils.errors import UserError, nearest

PLUGINS = "CAMEX_FT_PLUGINS"
PREFIX = "camex_"  # of `config.model_type` where a model has experts: camex_bert
T = TypeVar("T")


class Registry(Generic[T]):
    """Names to entries of one kind, discovered on first use.

    Args:
        kind: what the entries are called in messages, such as ``"protocol"``.
        package: dotted name of the package whose modules register entries.
        skip: modules of the package that register none and take long to import.
    """

    def __init__(self, kind: str, package: str, *, skip: tuple[str, ...] = ()) -> None:
        self.kind = kind
        self.package = package
        self.skip = skip
        self._entries: dict[str, T] = {}
        self._scanned = False

    def add(self, name: str, entry: T) -> T:
        """Register `entry`; a second entry of the same name is a `ValueError`."""
        if name in self._entries:
            raise ValueError(f"{self.kind} '{name}' is registered twice")
        self._entries[name] = entry
        return entry

    def remove(self, name: str) -> None:
        """Forget an entry, as tests of throw-away entries do."""
        del self._entries[name]

    def names(self) -> tuple[str, ...]:
        """Return all names, sorted."""
        self._discover()
        return tuple(sorted(self._entries))

    def get(self, name: str) -> T:
        """Return the entry, or raise `UserError` with the nearest name and the list of valid ones."""
        names = self.names()
        if name not in self._entries:
            raise UserError(
                f"unknown {self.kind} '{name}'.{nearest(name, names)} Known {self.kind}s: {', '.join(names)}. "
                f"A new one is one file in {self.package.replace('.', '/')}/ or in a folder named by {PLUGINS}."
            )
        return self._entries[name]

    def _discover(self) -> None:
        if not self._scanned:
            self._scanned = True
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                if module.name not in self.skip:
                    importlib.import_module(f"{self.package}.{module.name}")
        import_plugins()


def import_plugins() -> None:
    """Import every plug-in file once; `UserError` for a file that fails."""
    for folder in filter(None, os.environ.get(PLUGINS, "").split(os.pathsep)):
        if not Path(folder).is_dir():
            raise UserError(f"{PLUGINS} names '{folder}', which is not a folder")
        for file in sorted(Path(folder).glob("*.py")):
            import_file(file)


def import_file(file: Path) -> None:
    """Import one plug-in file under a unique name; a second call does nothing."""
    name = f"camex_ft_plugin_{file.resolve()}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"plug-in {file} failed to import: {type(error).__name__}: {error}") from error


PROTOCOLS: Registry[Any] = Registry("protocol", "camex_ft.protocols")
BACKBONES: Registry[Any] = Registry("backbone family", "camex_ft.backbones.families")
TASKS: Registry[Any] = Registry("task", "camex_ft.tasks", skip=("metrics",))
EMBEDDED: Registry[Any] = Registry("embedded backbone", "camex_ft.synthetic")
MERGE_METHODS: Registry[Any] = Registry("merge method", "camex_ft.static.methods")


# -- types of models


def plain_type(model_type: str) -> str:
    """Return the `config.model_type` of the dense model that an upcycled one was made from, or its own."""
    return str(model_type).removeprefix(PREFIX)


def families() -> dict[str, Any]:
    """Return the family of each type of model that is supported, by `config.model_type`."""
    known = [BACKBONES.get(name) for name in BACKBONES.names()]
    return {model_type: family for family in known for model_type in family.model_types}


def refused_type(model_type: object) -> str:
    """Return why a type of model is not served by the family of its architecture; "" for any other type."""
    known = [BACKBONES.get(name) for name in BACKBONES.names()]
    return next((str(f.refused[model_type]) for f in known if model_type in f.refused), "")


def positions(config: Any) -> int | None:
    """Return the most tokens that a model with this transformers configuration reads, or None where there is no limit.

    The model is dense or upcycled; one of a type that is not supported has no limit here.
    """
    family = families().get(plain_type(config.model_type))
    return None if family is None else family.positions(config)


def not_supported(model_type: object) -> str:
    """Return a message: no family serves this type of model, and the supported types."""
    why = refused_type(model_type)
    if why:
        return f"holds a model that is not supported: {why}"
    module = str(model_type).replace("-", "_")
    return (
        f"holds a model of the type '{model_type}', which no backbone family serves. Supported types: "
        f"{', '.join(sorted(families()))}. To add it, write one file, camex_ft/backbones/families/{module}.py, that "
        f"lists its feed-forward layers (or put that file in a folder named by {PLUGINS})"
    )
