"""The command ``camex-ft branch``. Other libraries are imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from camex_ft.cli.compare import Seeds, read_seeds
from camex_ft.utils.errors import INTERRUPTED


def branch(
    spec: Annotated[
        str, typer.Argument(metavar="SPEC", help="A specification, such as configs/studies/domains.yaml.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to every step.")
    ] = None,
    seeds: Seeds = "",
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Runs at a time; by default one a GPU, on a CPU one, or one a core for tiny models."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run finished steps again.")] = False,
) -> None:
    """Train branches of one start on their own data, merge them, and compare with dense training.

    Interrupted at any point, the same command goes on. A step that fails stops those that need it; exit code 1.
    """
    from camex_ft.branching.execution import run_study
    from camex_ft.branching.stages import make_study
    from camex_ft.branching.study import read_study

    study = make_study(
        read_study(spec), name=Path(spec).stem, overrides=overrides or [], seeds=read_seeds(seeds)
    )
    typer.echo(study.reason)
    try:
        failed = run_study(study, jobs=jobs, force=force)
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. The same command runs the missing steps.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if failed:
        raise typer.Exit(1)
