"""The commands ``camex-ft export`` and ``camex-ft push``. Other libraries are imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ROWS = 512  # as `camex_ft.exporting.export.ROWS`, which would import torch
License = Annotated[
    str | None,
    typer.Option(
        "--license", help="License of the weights, for the card: an identifier of the hub, such as mit."
    ),
]


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run: results/runs/...")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    as_: Annotated[
        str,
        typer.Option(
            "--as",
            help="dense: the original architecture, merged once with the mean routing weights; folded: curvature and "
            "mask folded into the experts.",
        ),
    ] = "dense",
    split: Annotated[
        str, typer.Option("--split", help="Split whose routing weights are averaged: train or validation.")
    ] = "train",
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="Number of its first rows to average over.")
    ] = ROWS,
    license: License = None,
) -> None:
    """Write a run's model as a dense checkpoint, or with curvature folded in, and measure the difference."""
    from camex_ft.exporting.export import export as export_run
    from camex_ft.exporting.writing import lines

    exported = export_run(run, out, as_=as_, split=split, rows=rows, license=license)
    for line in lines(exported):
        typer.echo(line)
    typer.echo(f"wrote {exported.folder}")


def push(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|DIR", help="A run, or the folder of a model or an export.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="On the hub: NAME/MODEL.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files and their sizes; send nothing.")
    ] = False,
    license: License = None,
) -> None:
    """Upload a model to the Hugging Face hub, with its tokenizer and card, and nothing else."""
    from camex_ft.exporting.pushing import push, upload_of

    upload = upload_of(source, repo_id, license=license)
    for line in upload.lines():
        typer.echo(line)
    if dry_run:
        typer.echo("dry run: nothing was sent")
        return
    typer.echo(f"wrote {push(upload, private=private)}")
