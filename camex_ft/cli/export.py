"""The commands ``camex-ft export`` and ``camex-ft push``. What they do is imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

ROWS = 512  # as `camex_ft.exporting.export.ROWS`, which torch comes with
License = Annotated[
    Optional[str],  # noqa: UP045 - typer reads annotations at run time
    typer.Option("--license", help="Of the weights, for the card: an identifier of the hub, such as mit."),
]


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run: results/runs/...")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    as_: Annotated[
        str,
        typer.Option(
            "--as",
            help="dense: the original architecture, merged once with the mean routing weights; folded: curvature and "
            "mask put into the experts.",
        ),
    ] = "dense",
    split: Annotated[
        str, typer.Option("--split", help="train or validation: whose routing weights are averaged.")
    ] = "train",
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many of its first rows.")] = ROWS,
    license: License = None,
) -> None:
    """Write a run's model as a plain checkpoint, or with curvature folded into its experts; measure what is lost."""
    from camex_ft.exporting.export import export as make
    from camex_ft.exporting.show import lines

    made = make(run, out, as_=as_, split=split, rows=rows, license=license)
    for line in lines(made):
        typer.echo(line)
    typer.echo(f"wrote {made.folder}")


def push(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|DIR", help="A run, or the folder of a model or an export.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="On the hub: NAME/MODEL.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is not public.")] = False,
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
