"""The command ``camex-ft merge``. Other libraries are imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from camex_ft.utils.errors import UserError


def merge(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="A YAML file with start, from and method.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as options.density=0.5."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="A new folder; default: `output` of SPEC."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the specification, print memory and disk; merge nothing.")
    ] = False,
) -> None:
    """Merge fine-tuned checkpoints of one start into one dense checkpoint."""
    from camex_ft.static.merge_spec import read_merge_spec

    written = read_merge_spec(spec, overrides or [])
    target = output or written.output
    if dry_run:
        from camex_ft.static.merge_needs import needs_of

        for line in needs_of(written).lines():
            typer.echo(line)
        return
    if target is None:
        raise UserError("output: is missing: expected a new folder, in the specification or as --output DIR")
    from camex_ft.static.merge import write_merge

    merged = write_merge(written, target, say=typer.echo)
    for line in merged.lines():
        typer.echo(line)
    typer.echo(f"wrote {merged.folder}")
