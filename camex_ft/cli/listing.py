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
        typer.Argument(
            help="backbones, comparisons, configs, embedded, merges, methods, protocols or tasks; all by default."
        ),
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


def _studies() -> Rows:
    from camex_ft.config.shipped import list_studies

    return [(study.name, study.summary) for study in list_studies()]


def _configs() -> Rows:
    from camex_ft.config import list_configs

    return [(config.name, config.summary) for config in list_configs()]


def _comparisons() -> Rows:
    from camex_ft.config.shipped import list_specifications

    return [(spec.name, spec.summary) for spec in list_specifications()]


def _merges() -> Rows:
    from camex_ft.config.shipped import list_merges

    return [(spec.name, spec.summary) for spec in list_merges()]


def _with_options(entry: Any) -> tuple[str, ...]:
    options = ", ".join(f"{option.name}={option.default}" for option in entry.options.values())
    return entry.name, options, entry.summary


# kind -> headings, and a function that returns the rows
KINDS: dict[str, tuple[tuple[str, ...], Callable[[], Rows]]] = {
    "protocols": (
        ("protocol", "options", "summary"),
        lambda: [*map(_with_options, _entries(registry.PROTOCOLS))],
    ),
    "backbones": (
        ("family", "model types", "summary"),
        lambda: [(f.name, ", ".join(f.model_types), f.summary) for f in _entries(registry.BACKBONES)],
    ),
    "embedded": (
        ("embedded backbone",),
        lambda: [(f"embedded/{name}",) for name in registry.EMBEDDED.names()],
    ),
    "tasks": (
        ("task", "metric", "summary"),
        lambda: [(f"{t.suite}/{t.name}", t.primary, t.summary) for t in _entries(registry.TASKS)],
    ),
    "configs": (("configuration", "summary"), _configs),
    "comparisons": (("comparison", "summary"), _comparisons),
    "methods": (
        ("merge method", "options", "summary"),
        lambda: [*map(_with_options, _entries(registry.MERGE_METHODS))],
    ),
    "merges": (("merge", "summary"), _merges),
    "studies": (("study", "summary"), _studies),
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
