"""The commands ``camex-ft ls`` and ``cp``: the names that a configuration can use, and a copy to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from camex_ft.utils import registry
from camex_ft.utils.errors import UserError, nearest
from camex_ft.utils.escaping import Rows, print_rows

if TYPE_CHECKING:
    from rich.console import Console


def ls(
    kind: Annotated[
        str,
        typer.Argument(help="backbones, comparisons, configs, embedded, protocols or tasks; all by default."),
    ] = "",
) -> None:
    """List the names that a configuration can use, with a line on each."""
    for name in [kind] if kind else KINDS:
        print_listing(name)


def cp(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A name that `camex-ft ls configs` lists.")],
    destination: Annotated[str, typer.Argument(metavar="DEST", help="A new file, or a folder.")],
) -> None:
    """Copy a configuration of the package, to change it."""
    from camex_ft.config import copy_config

    typer.echo(f"wrote {copy_config(config, destination)}")


def backbones() -> Rows:
    """Families of backbones: name, the transformers model types that they serve, summary."""
    return [(f.name, ", ".join(f.model_types), f.summary) for f in _entries(registry.BACKBONES)]


def comparisons() -> Rows:
    """Specifications of comparisons that come with the package: name, summary."""
    from camex_ft.config.shipped import list_specifications

    return [(spec.name, spec.summary) for spec in list_specifications()]


def configs() -> Rows:
    """Configurations that come with the package: name, summary."""
    from camex_ft.config import list_configs

    return [(config.name, config.summary) for config in list_configs()]


def embedded() -> Rows:
    """Backbones that the package makes itself: the value of `backbone:`."""
    return [(f"embedded/{name}",) for name in registry.EMBEDDED.names()]


def protocols() -> Rows:
    """Merging protocols: name, own options with defaults, summary."""
    return [
        (p.name, ", ".join(f"{o.name}={o.default}" for o in p.options.values()), p.summary)
        for p in _entries(registry.PROTOCOLS)
    ]


def tasks() -> Rows:
    """Tasks: suite and name, primary metric, summary."""
    return [(f"{t.suite}/{t.name}", t.primary, t.summary) for t in _entries(registry.TASKS)]


KINDS: dict[str, tuple[tuple[str, ...], Callable[[], Rows]]] = {
    "protocols": (("protocol", "options", "summary"), protocols),
    "backbones": (("family", "model types", "summary"), backbones),
    "embedded": (("embedded backbone",), embedded),
    "tasks": (("task", "metric", "summary"), tasks),
    "configs": (("configuration", "summary"), configs),
    "comparisons": (("comparison", "summary"), comparisons),
}


def print_listing(kind: str, *, console: Console | None = None) -> None:
    """Print the table of one kind; an unknown kind is a `UserError`."""
    from rich.console import Console

    if kind not in KINDS:
        raise UserError(
            f"nothing to list under '{kind}'.{nearest(kind, KINDS)} Choose from: {', '.join(KINDS)}."
        )
    headings, rows = KINDS[kind]
    print_rows(headings, rows(), console=console or Console())


def _entries(kind: registry.Registry[Any]) -> Iterable[Any]:
    return [kind.get(name) for name in kind.names()]
